"""The commands of the command line, one file each; `mace.commands.registry` lists them.

A command's file has

    Options         a frozen dataclass with one field for each option and argument
    add(parser)     adds the options and arguments to the parser, under the names of the fields of `Options`
    run(options, console) -> int
                    runs the command; returns the exit status

The file imports at its top only what the help text needs; `run` imports the modules that take long to import.
"""
