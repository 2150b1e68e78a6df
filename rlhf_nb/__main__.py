"""The `rlhf_nb` command, and `python -m rlhf_nb`. Written by hand: no notebook makes this file.

It starts before anything heavy is imported, so that Ctrl-C is quiet from the first moment, and starts the app without
what the other commands need, so that the page is there quickly."""
import gc
import importlib
import io
import os
import signal
import sys
import time
import traceback

from rlhf_nb import __version__

# commands with flags of their own, which start without what the others need
own = {'app':('rlhf_nb.app', 'app_main'), 'bench':('rlhf_nb.benchmark', 'bench_main')}


def _interrupted(*_):
    "Ctrl-C while modules are imported: nothing has begun that must be ended"
    os.write(2, b'\nrlhf_nb: interrupted\n')
    os._exit(130)


def _quiet_interrupt():
    "Until the imports are done, which take seconds, Ctrl-C ends the process in one line"
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler: return
    try: signal.signal(signal.SIGINT, _interrupted)
    except ValueError: pass                            # not the main thread: Ctrl-C is not ours


# of the processes that torchrun starts these share the work; another command is the first one's
shared = 'demo','run','train'


def _beside(name, args):
    "What another process than the first does: it says nothing, unless it is the one that fails"
    if name not in shared: return
    out,sys.stdout,sys.stderr = sys.stderr,open(os.devnull, 'w', encoding='utf-8'),io.StringIO()
    try: return _alone(name, args)
    except BaseException as e:
        if isinstance(e, SystemExit) and e.code in (None,0,130): raise
        if not isinstance(e, SystemExit): traceback.print_exc()
        # what all processes find wrong the first one tells; with it this one is ended here
        time.sleep(3)
        out.write(sys.stderr.getvalue())
        out.flush()
        os._exit(2 if isinstance(e, SystemExit) else 1)


def _alone(name, args):
    "What the only process does, or the first of several"
    from rlhf_nb.core import in_one_line
    return in_one_line(_start, name, args)


def _start(name, args):
    "Import what the command needs, and nothing else, and run it"
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')     # a page for this machine reports to nobody
    # in a file the bars of libraries would be thousands of characters in one line
    if not sys.stderr.isatty():
        for o in ('HF_HUB_DISABLE_PROGRESS_BARS','HF_DATASETS_DISABLE_PROGRESS_BARS'): os.environ.setdefault(o, '1')
    # gradio asks for the backend at each event; where none is set that imports pyplot
    if name=='app': os.environ.setdefault('MPLBACKEND', 'agg')
    from rlhf_nb.core import no_gc
    module,function = own.get(name, ('rlhf_nb.cli', 'main'))
    with no_gc(): main = getattr(importlib.import_module(module), function)
    gc.freeze()                                                    # what was imported stays: nobody shall look for garbage there
    if signal.getsignal(signal.SIGINT) is _interrupted: signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(args[1:] if name in own else args)


def command():
    "Entry point of the `rlhf_nb` command"
    if sys.argv[1:]==['--version']:
        print(f'rlhf_nb {__version__}')
        return
    _quiet_interrupt()
    # what a terminal's encoding does not hold is written as its number, as errors are
    if hasattr(sys.stdout, 'reconfigure'): sys.stdout.reconfigure(errors='backslashreplace')
    first = int(os.environ.get('WORLD_SIZE', 1))==1 or os.environ.get('RANK', '0')=='0'
    name = sys.argv[1] if sys.argv[1:] else ''
    if first:
        # help, and what is wrong with the flags: nobody waits for torch to be told
        from rlhf_nb.flags import read_args,shell_script
        a = read_args(sys.argv[1:])
        if name=='completion':
            print(shell_script(a.shell))
            return
    return (_alone if first else _beside)(name, sys.argv[1:])


if __name__=='__main__': sys.exit(command())
