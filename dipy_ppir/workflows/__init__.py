"""Commands, as ``dipy.workflows`` does them.

::

    cli ──> align, syn   the flows: check, register, write
              ├──> flow      what they share: names of files, mistakes explained
              ├──> inputs    read images and masks, refuse what cannot work
              ├──> outputs   files that appear whole or not at all
              ├──> mapping   diffeomorphic maps as files
              ├──> progress  a live display on a terminal, log lines elsewhere
              ├──> figures   pictures
              └──> report    a page of HTML: the result, and what each party learned
                     ├──> slices, charts   what it shows
                     └──> templates        how that looks
    cli ──> transform    apply what a registration found
    cli ──> streams      standard output and error that take everything
    demo ──> align, syn
"""
