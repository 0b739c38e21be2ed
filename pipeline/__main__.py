import signal

from pipeline.cli import main

if hasattr(signal, "SIGPIPE"):  # `... | head` ends a command that prints, as it ends other programs
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
main(prog_name="python -m pipeline")
