"""The commands of the command line, one file each, which `mace.commands.registry` lists.

A command's file has

    Options         a frozen dataclass: everything that can be asked of it
    add(parser)     its options and arguments, whose names in the parser are the fields of `Options`
    run(options, console) -> int
                    what it does; returns the exit status

The file imports at its top only what the help text needs; whatever takes long to import is imported by `run`.
"""
