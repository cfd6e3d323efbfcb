def mutual_information(*a): raise NotImplementedError
