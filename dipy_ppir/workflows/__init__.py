"""Commands, as ``dipy.workflows`` does them.

::

    cli ──> align, syn, freeform, points   the flows: check, register, write
    │         ├──> flow      what they share: names of files, mistakes explained
    │         ├──> inputs    read images and masks, refuse what cannot work
    │         ├──> outputs   files that appear whole or not at all
    │         ├──> results   transforms and maps as files
    │         ├──> progress  a live display on a terminal, log lines elsewhere
    │         ├──> figures   pictures
    │         └──> report    a page of HTML: the result, and what each party learned
    │                ├──> slices, charts   what it shows
    │                └──> templates        how that looks
    ├───> sites      keys, session files, the helper
    ├───> cohort     many pairs between sites, by an engine, each as a command
    │         └──> cohortfolder   of which site and plan a folder is
    ├───> template   sites that build a template from sums
    ├───> bids       images of a BIDS dataset, by the flows
    │         └──> bidsnames   names of their files
    ├───> boutiques  descriptors of the commands
    │         └──> commands    what arguments they take
    ├───> transform, convert   apply what a registration found; for other programs
    └───> streams    standard output and error that take everything
    demo ──> align, syn
"""
