"""One module for each `cocoa` sub-command: words of a command line in, an exit status out."""
