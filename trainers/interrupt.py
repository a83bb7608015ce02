"""Imported first by the scripts: a Ctrl-C while the others are imported, which takes seconds, ends the process and prints no traceback.

Nor is memory collected meanwhile, as modules leave next to none to collect: a quarter of those seconds.
"""

import gc
import signal

gc.disable()  # until trainers.command.run_main

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until trainers.command.run_main listens
