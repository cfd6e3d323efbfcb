"""Commands, as ``dipy.workflows`` does them.

::

    cli ──> align      the flow: check, register, write
              ├──> inputs    read images and masks, refuse what cannot work
              ├──> outputs   files that appear whole or not at all
              ├──> progress  a live display on a terminal, log lines elsewhere
              └──> figures   overlay pictures
    demo ──> align
"""
