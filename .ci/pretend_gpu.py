#!/usr/bin/env python3
"""A pretend GPU: code of PyTorch runs on the CPU as if its tensors were on `cuda` (or `mps`), and what a real one would not take is an error.

Every tensor is an ordinary one and every result is right, but its storage has a logical device: `tensor.device` says `cuda:0`,
`torch.cuda.is_available()` is true, accelerate picks the GPU, autocast and GradScaler work (by the CPU's own autocast). As on a GPU,
  - operands on two devices are an error (0-dim CPU tensors in pointwise ops, CPU indices into a CUDA tensor and `copy_` are not),
    and so are `.numpy()` of a device tensor, a CPU generator that fills one, and float64 on `mps`.
Counted, with the file and line of the innermost frame of a watched package, are
  - synchronisations of host and device: .item(), int(), bool(), .tolist(), nonzero, indexing by a mask, unique, copies between the two
  - ops that would launch at least one kernel: a lower bound of the launches
  - bytes on the device: now, at most, and where that was (`torch.cuda.max_memory_allocated`, without the kernels' workspaces).
Not seen: whether there is a CUDA kernel for an op and dtype, its numbers, its determinism; threads and what else runs before `with PretendGPU()`.

  python .ci/pretend_gpu.py selftest
  python .ci/pretend_gpu.py stages [--precision fp32|bf16|fp16] [--kind cuda|mps] [--only sft reward ...]    every stage of the command, tiny
  python .ci/pretend_gpu.py library [--precision ...] [--kind ...]    the calls of a user's notebook, with models where `load_policy` puts them
  python .ci/pretend_gpu.py app                                       the page over HTTP: one comparison, the CPU's answers
  python .ci/pretend_gpu.py resume [--precision ...] [--only sft ...] each stage killed and gone on with: equal weights and logs
  python .ci/pretend_gpu.py notebooks nbs/27_rollout.ipynb ...        code cells, one after another; a failing one is reported and passed over
  python .ci/pretend_gpu.py notebooks --quick nbs/27_rollout.ipynb    only two updates of each training, and only faults of devices
  python .ci/pretend_gpu.py notebooks --slow nbs/32_evaluate.ipynb    the cells marked slow too
  python .ci/pretend_gpu.py limits                                    sampling and layouts: the CPU's answers, and what they may ask of a GPU
  python .ci/pretend_gpu.py training                                  updates: how often the host waits, fp16 killed and resumed
  python .ci/pretend_gpu.py counts                                    synchronisations and launches for a token, a micro-batch, an update
  python .ci/pretend_gpu.py memory [--only sft ...]                   bytes of the largest step of each stage, preset `full`, GPT-2's shape: a quarter of an hour
  python .ci/pretend_gpu.py script FILE [ARGS]                        any script
Slower than the plain CPU by 3 to 10 times for tiny models. The exit code is 1 where a fault was found.
"""
import argparse,collections,contextlib,functools,gc,itertools,os,re,sys,threading,time,traceback,types,weakref

os.environ.setdefault('HF_HUB_OFFLINE', '1'); os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_T = torch.Tensor
_hide = torch._C.DisableTorchFunction

VIEWS = {'view','_unsafe_view','_reshape_alias','reshape','t','transpose','permute','expand','slice','select','as_strided','unsqueeze','squeeze','squeeze_',
         'unsqueeze_','detach','detach_','alias','split','split_with_sizes','unbind','lift_fresh','lift','diagonal','narrow','unfold','view_as_real','movedim',
         'empty','empty_like','empty_strided','new_empty','new_empty_strided','set_','resize_','is_same_size','sym_size','sym_numel','sym_stride','_conj',
         'is_pinned','_has_compatible_shallow_copy_type','numel','real','swapaxes','unflatten','chunk','tensor_split','as_strided_','transpose_','t_',
         '_local_scalar_dense','item','flatten','numpy_T','mT','mH','T','embedding'}   # embedding is an index_select, which is counted
INDEXED = {'index','index_put','index_put_','_index_put_impl_','_unsafe_index','_unsafe_index_put'}
SYNCING = {'nonzero':'nonzero','masked_select':'masked_select','_unique2':'unique','unique_dim':'unique','unique_consecutive':'unique','bincount':'bincount',
           'equal':'equal','_local_scalar_dense':'item','is_nonzero':'bool','nonzero_numpy':'nonzero'}
ZERO_OK = {'fill_','masked_fill','masked_fill_','where','index_fill_','index_fill','clamp','lerp','full_like','copy_'}  # a 0-dim CPU tensor may stand beside


class DeviceError(RuntimeError):
    "What a real device would have raised"


def _tensors(o, out):
    if isinstance(o, _T): out.append(o)
    elif isinstance(o, (list, tuple)):
        for x in o: _tensors(x, out)
    elif isinstance(o, dict):
        for x in o.values(): _tensors(x, out)
    return out


class Book:
    "Which storages are on the device, how many bytes, which events"
    def __init__(self, kind, watch):
        self.kind,self.watch,self.live,self.now,self.peak,self.peak_at = kind,watch,{},0,0,''
        self.syncs,self.launches,self.ops = collections.Counter(),collections.Counter(),collections.Counter()
        self.phase,self.seen,self.local = '',set(),threading.local()
    @property
    def ctx(self):
        "For each call in progress in this thread: are its results on the device?"
        return self.local.__dict__.setdefault('ctx', [None])
    def name(self): return 'cuda:0' if self.kind=='cuda' else 'mps:0'
    def on(self, t):
        "Is `t` on the device?"
        if t.layout is not torch.strided or t.is_meta: return False
        try: return id(t.untyped_storage()) in self.live
        except (RuntimeError, NotImplementedError): return False
    def put(self, t):
        "Say that `t` is on the device"
        if t.is_meta or t.layout is not torch.strided: return
        if self.kind=='mps' and t.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead.")
        s = t.untyped_storage(); k = id(s)
        if k in self.live: return
        n = -(-s.nbytes()//512)*512
        self.live[k] = weakref.ref(s, lambda _,k=k,n=n: self._gone(k, n)),n
        self.now += n
        if self.now>self.peak: self.peak,self.peak_at = self.now,self.where()
    def _gone(self, k, n):
        if self.live.pop(k, None): self.now -= n
    def where(self):
        f,first = sys._getframe(1),None
        while f:
            n = f.f_code.co_filename
            if any(w in n for w in self.watch) and 'pretend_gpu' not in n: return f'{os.path.basename(n)}:{f.f_lineno} {f.f_code.co_name}'
            if first is None and 'pretend_gpu' not in n and f'{os.sep}torch{os.sep}' not in n: first = f'{os.path.basename(n)}:{f.f_lineno} {f.f_code.co_name}'
            f = f.f_back
        return first or '?'
    def sync(self, what): self.syncs[self.phase,what,self.where()] += 1


class _Function(TorchFunctionMode):
    "The Python level: devices in arguments and properties"
    def __init__(self, book): super().__init__(); self.b = book
    def __torch_function__(self, func, types, args=(), kwargs=None):
        b = self.b
        if not b.live and func not in _moves and not (kwargs and 'device' in kwargs): return func(*args, **kwargs or {})   # all is on the CPU
        kw = dict(kwargs or {})
        h = _handlers.get(func)
        if h is not None: return h(self, b, func, args, kw)
        name = getattr(func, '__name__', '')
        want = kw.get('device')
        if want is not None and not isinstance(want, str): want = str(want) if not isinstance(want, int) else b.name()
        ins = _tensors((args,kw), [])
        if want is None:
            dev = any(b.on(t) for t in ins)
            explicit = None
        elif want.split(':')[0]=='meta': return func(*args, **kw)
        else: dev = explicit = want.split(':')[0]==b.kind; kw['device'] = 'cpu'
        g = kw.get('generator')
        if g is not None and dev and g.device.type!=b.kind:
            raise DeviceError(f"Expected a '{b.kind}' device type for generator but found '{g.device.type}' ({name})")
        b.ctx.append(dev)
        try: out = func(*args, **kw)
        finally: b.ctx.pop()
        if explicit:
            for t in _tensors(out, []): b.put(t)
            if name in ('tensor','as_tensor','asarray'): b.sync('host to device')
        elif want is not None and name in ('as_tensor','asarray') and any(b.on(t) for t in ins): # device='cpu' of a device tensor
            out = out.clone(); b.sync('device to host')
        return out


def _device(mode, b, func, args, kw):
    return torch.device(b.name()) if b.on(args[0]) else func(*args, **kw)
def _is(kind):
    def f(mode, b, func, args, kw): return kind==b.kind if b.on(args[0]) else (False if kind!='cpu' else func(*args, **kw)) if kind!='cpu' else not b.on(args[0])
    return f
def _no_numpy(mode, b, func, args, kw):
    if b.on(args[0]): raise TypeError(f"can't convert {b.name()} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
    return func(*args, **kw)
def _tolist(mode, b, func, args, kw):
    if b.on(args[0]): b.sync('tolist')
    return func(*args, **kw)
def _pin(mode, b, func, args, kw):
    "Page-locked memory, from which a copy need not be waited for"
    if b.on(args[0]): raise DeviceError(f"cannot pin '{b.name()}' only dense CPU tensors can be pinned")
    out = args[0].detach().clone(); out.is_page_locked = True
    return out
def _move(b, func_to, x, to_device, dtype=None, copy=False, wait=True, **kw):
    cur = b.on(x)
    if to_device is None or to_device==cur:
        return func_to(x, dtype, copy=copy, **kw) if dtype is not None else func_to(x, x.dtype, copy=copy, **kw)
    out = _Moved.apply(x, b, to_device, dtype or x.dtype)
    # to the device a copy from page-locked memory is queued; what comes back unwaited would be read too early
    if wait or not to_device or not getattr(x, 'is_page_locked', False): b.sync('host to device' if to_device else 'device to host')
    return out
class _Moved(torch.autograd.Function):
    "A copy on the other device; its gradient goes the way back"
    @staticmethod
    def forward(ctx, x, b, on, dtype):
        ctx.book,ctx.on,ctx.dtype = b,on,x.dtype
        b.ctx.append(False)
        try: out = x.detach().to(dtype, copy=True)
        finally: b.ctx.pop()
        _retag(b, out, on)
        if not dtype.is_floating_point: ctx.mark_non_differentiable(out)
        return out
    @staticmethod
    def backward(ctx, g):
        with _hide(): out = g.detach().to(ctx.dtype, copy=True); _retag(ctx.book, out, not ctx.on)
        ctx.book.sync('host to device' if not ctx.on else 'device to host')
        return out,None,None,None
def _retag(b, t, on):
    k = id(t.untyped_storage())
    if on: b.put(t)
    elif k in b.live: _,n = b.live.pop(k); b.now -= n
def _to(mode, b, func, args, kw):
    x,rest = args[0],list(args[1:])
    dev,dtype,copy,mf = kw.get('device'),kw.get('dtype'),kw.get('copy', False),kw.get('memory_format')
    other = kw.get('other')
    for o in rest:
        if isinstance(o, _T): other = o
        elif isinstance(o, torch.dtype): dtype = o
        elif isinstance(o, (str, torch.device, int)) and not isinstance(o, bool): dev = o
    if other is not None: dev,dtype = (b.name() if b.on(other) else 'cpu'),other.dtype
    if dev is not None and str(dev).split(':')[0]=='meta': return func(*args, **kw)
    extra = {} if mf is None else dict(memory_format=mf)
    to = None if dev is None else (True if isinstance(dev, int) else str(dev).split(':')[0]==b.kind)
    return _move(b, _T.to, x, to, dtype, copy, wait=not kw.get('non_blocking', False), **extra)
def _cuda(mode, b, func, args, kw): return _move(b, _T.to, args[0], True)
def _cpu(mode, b, func, args, kw): return _move(b, _T.to, args[0], False)
def _backward(mode, b, func, args, kw):
    x,names = args[0],('gradient','retain_graph','create_graph','inputs')
    kw = {**dict(zip(names, args[1:])), **kw}
    b.ctx.append(b.on(x))
    try:
        with mode: return torch.autograd.backward(x, kw.get('gradient'), kw.get('retain_graph'), kw.get('create_graph', False), inputs=kw.get('inputs'))
    finally: b.ctx.pop()
def _deepcopy(mode, b, func, args, kw):
    out = func(*args, **kw)
    if b.on(args[0]): b.put(out)
    return out
def _get_device(mode, b, func, args, kw): return 0 if b.on(args[0]) else -1

_handlers = {_T.device.__get__:_device, _T.is_cuda.__get__:_is('cuda'), _T.is_mps.__get__:_is('mps'), _T.is_cpu.__get__:_is('cpu'),
             _T.numpy:_no_numpy, _T.__array__:_no_numpy, _T.tolist:_tolist, _T.to:_to, _T.cuda:_cuda, _T.cpu:_cpu, _T.backward:_backward,
             _T.__deepcopy__:_deepcopy, _T.get_device:_get_device, _T.pin_memory:_pin}
_moves = {_T.to,_T.cuda,_T.pin_memory}


class _Dispatch(TorchDispatchMode):
    "The level of aten: operands, results, events"
    def __init__(self, book): super().__init__(); self.b = book
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with _hide(): return self._do(func, args, kwargs or {})
    def _do(self, func, args, kw):
        b = self.b
        if not b.live and not b.ctx[-1]: return func(*args, **kw)
        name = func._schema.name.split('::')[1]
        ins = _tensors((args,kw), [])
        dev = self._common(name, func, args, kw, ins)
        if dev:
            if (w := SYNCING.get(name)): b.sync(w)
            elif name=='repeat_interleave' and isinstance(args[0], _T) and kw.get('output_size') is None and len(args)<2: b.sync('repeat_interleave')
            elif name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                v = args[2] if name!='index' and len(args)>2 else None
                if not (v is not None and v.numel()==1 and not (len(args)>3 and args[3])): b.sync('bool mask index')
            if name=='copy_' and len(args)>1 and isinstance(args[1], _T) and args[1].numel() and b.on(args[0])!=b.on(args[1]):
                if not (args[1].dim()==0 and not b.on(args[1])): b.sync('device to host' if b.on(args[1]) else 'host to device')
            if name not in VIEWS: b.launches[b.phase] += 1; b.ops[b.phase,name] += 1
        if func is aten.mm.dtype: out = aten.mm(*(x.to(args[2]) for x in args[:2]))     # a GPU's own kernel: half in, float32 out
        else: out = func(*args, **kw)
        if dev:
            for t in _tensors(out, []): b.put(t)
        return out
    def _common(self, name, func, args, kw, ins):
        "The device of the result: one, or an error"
        b = self.b
        if not ins: return bool(b.ctx[-1])
        on = [b.on(t) for t in ins]
        if all(on): return True
        if not any(on): return False
        if name in ('copy_','_to_copy','set_','_copy_from','resize_as_','_has_compatible_shallow_copy_type'): return on[0]
        if name in INDEXED:
            idx = [i for i in args[1] if i is not None]
            if not b.on(args[0]): raise DeviceError(f'indices should be either on cpu or on the same device as the indexed tensor (cpu); got {b.name()} ({name})')
            if name!='index' and len(args)>2 and not b.on(args[2]) and args[2].dim()>0:
                raise DeviceError(f'Expected all tensors to be on the same device, but found at least two devices, {b.name()} and cpu! (index_put values)')
            if any(not b.on(i) for i in idx): b.sync('host to device')
            return True
        pointwise = torch.Tag.pointwise in func.tags or name in ZERO_OK or name.startswith('_foreach')
        rest = [o for t,o in zip(ins, on) if not (pointwise and t.dim()==0 and not o)]
        if all(rest): return True
        shapes = ', '.join(f"{b.name() if o else 'cpu'}{tuple(t.shape)}" for t,o in zip(ins, on))
        raise DeviceError(f'Expected all tensors to be on the same device, but found at least two devices, {b.name()} and cpu! ({func}: {shapes})')


class PretendGPU:
    "Within it, `kind` ('cuda' or 'mps') is there"
    def __init__(self, kind='cuda', capability=(8,0), watch=('rlhf_nb',), memory=16<<30):
        self.book,self.kind,self.capability,self.memory = Book(kind, watch),kind,capability,memory
    def __getattr__(self, k): return getattr(self.__dict__['book'], k)
    @contextlib.contextmanager
    def phase(self, name):
        old,self.book.phase = self.book.phase,name
        try: yield self
        finally: self.book.phase = old
    def reset(self):
        for c in (self.book.syncs,self.book.launches,self.book.ops): c.clear()
        self.reset_peak()
    def reset_peak(self, *a, **k): self.book.peak,self.book.peak_at = self.book.now,''
    def _patches(self):
        b,kind,auto = self.book,self.kind,torch.amp.autocast_mode.autocast
        begin = threading.Thread._bootstrap_inner
        def begin_here(thread):
            with _Dispatch(b),_Function(b): return begin(thread)
        yield threading.Thread,'_bootstrap_inner',begin_here
        yield torch.backends.cuda,'is_built',lambda: False      # no kernels, so no graphs of them
        cpu = lambda d: 'cpu' if d is not None and str(d).split(':')[0]==kind else d
        class Autocast(auto):
            def __init__(s, device_type=None, dtype=None, enabled=True, cache_enabled=None): super().__init__(cpu(device_type), dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
        is_on,get_dt = torch.is_autocast_enabled,torch.get_autocast_dtype
        import torch.utils._foreach_utils as fu, torch.optim.optimizer as oo, torch.nn.utils.clip_grad as cg
        group = fu._group_tensors_by_device_and_dtype
        def grouped(lists, with_indices=False):     # C++ reads the real device
            out = {}
            for (d,dt),v in group(lists, with_indices).items():
                t = next((x for x in v[0][0] if x is not None), None)
                with _hide(): on = t is not None and b.on(t)
                out[torch.device(b.name()) if on else d,dt] = v
            return out
        for m in (fu, oo, cg):
            if hasattr(m, '_group_tensors_by_device_and_dtype'): yield m,'_group_tensors_by_device_and_dtype',grouped
        import safetensors.torch
        opened = safetensors.torch.safe_open
        @contextlib.contextmanager
        def safe_open(*args, device='cpu', **kw):   # Rust puts tensors on the real device
            with opened(*args, device=cpu(device), **kw) as f:
                yield type('Opened', (), dict(get_tensors=lambda s: {k:v.to(device) for k,v in f.get_tensors().items()}))()
        yield safetensors.torch,'safe_open',safe_open
        import torch.distributed as dist
        join = dist.init_process_group
        yield dist,'init_process_group',lambda backend=None, *args, **kw: join('gloo', *args, **kw)     # no NCCL without a card
        yield torch,'autocast',Autocast
        yield torch.amp,'autocast',Autocast
        yield torch.amp.autocast_mode,'autocast',Autocast
        yield torch,'is_autocast_enabled',lambda *a: is_on(*map(cpu, a))
        yield torch,'get_autocast_dtype',lambda d: get_dt(cpu(d))
        if kind=='mps':
            yield torch.backends.mps,'is_available',lambda: True
            yield torch.backends.mps,'is_built',lambda: True
            yield torch.mps,'empty_cache',lambda: None
            yield torch.mps,'synchronize',lambda: None
            yield torch,'Event',type('Event', (), dict(__init__=lambda self, *a, **kw: None, record=lambda *a: None, synchronize=lambda self: None, query=lambda self: True))
            return
        props = type('Props', (), dict(name='pretend GPU', total_memory=self.memory, major=self.capability[0], minor=self.capability[1], multi_processor_count=40))()
        def told(x):
            "What a function tells of the only card; of another there is nothing to tell"
            def f(device=None):
                i = device if isinstance(device, int) else torch.device(device or 'cuda').index
                if i: raise AssertionError('Invalid device id')
                return x
            return f
        for k,v in dict(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, set_device=lambda *a: None, _exchange_device=lambda i: 0, _maybe_exchange_device=lambda i: 0, empty_cache=lambda: None,
                        synchronize=lambda *a: b.sync('synchronize'), get_device_capability=told(self.capability), get_device_name=told(props.name),
                        get_device_properties=told(props), is_bf16_supported=lambda *a, **k: self.capability>=(8,0), memory_allocated=lambda *a: b.now,
                        max_memory_allocated=lambda *a: b.peak, max_memory_reserved=lambda *a: b.peak, memory_reserved=lambda *a: b.now, set_sync_debug_mode=lambda *a: None, is_current_stream_capturing=lambda: False, is_initialized=lambda: True, _lazy_init=lambda: None,
                        get_rng_state=lambda *a: torch.get_rng_state(), set_rng_state=lambda s,*a: torch.set_rng_state(s), manual_seed_all=lambda s: None, manual_seed=lambda s: None, current_stream=lambda *a: None, _is_in_bad_fork=lambda: False, reset_peak_memory_stats=self.reset_peak, mem_get_info=lambda *a: (self.memory-b.now,self.memory)).items():
            yield torch.cuda,k,v
    def __enter__(self):
        self.saved = []
        for o,k,v in self._patches(): self.saved.append((o,k,getattr(o, k))); setattr(o, k, v)
        self.modes = _Dispatch(self.book),_Function(self.book)
        for m in self.modes: m.__enter__()
        return self
    def __exit__(self, *e):
        for m in reversed(self.modes): m.__exit__(*e)
        for o,k,v in reversed(self.saved): setattr(o, k, v)
    def report(self, top=40, out=sys.stdout):
        b = self.book
        print(f'bytes on the device: now {b.now/1e6:.1f} MB, peak {b.peak/1e6:.1f} MB at {b.peak_at}', file=out)
        for p in dict.fromkeys([*b.launches,*(k[0] for k in b.syncs)]):
            n = sum(v for k,v in b.syncs.items() if k[0]==p)
            print(f"phase {p or '-'}: {b.launches[p]} launches or more, {n} synchronisations", file=out)
            for (q,what,where),v in sorted(b.syncs.items(), key=lambda o: -o[1])[:10**6]:
                if q==p and top: print(f'  {v:6d}  {what:18s} {where}', file=out)


# ---------------------------------------------------------------------------------------------------------------- rlhf_nb under it
def _attempt(name, f, faults):
    t = time.perf_counter()
    try: f(); print(f'ok    {name} ({time.perf_counter()-t:.1f} s)', flush=True); return True
    except Exception as e:
        last = [o for o in traceback.extract_tb(e.__traceback__) if 'pretend_gpu' not in o.filename]
        ours = [o for o in last if 'rlhf_nb' in o.filename] or last[-1:] or traceback.extract_tb(e.__traceback__)[-1:]
        o = ours[-1]
        print(f'FAULT {name}: {os.path.basename(o.filename)}:{o.lineno} {o.name}: {type(e).__name__}: {str(e)[:300]}', flush=True)
        if os.environ.get('PRETEND_TRACEBACK'): traceback.print_exc()
        faults.append(name); return False


def tiny_config(precision='fp32', device='auto', **sets):
    from rlhf_nb.settings import load_config
    base = dict(jobs=1, device=device, **{'model.precision':precision, 'world.n_corpus':300, 'world.n_facts':40, 'world.n_pairs':120, 'world.n_dev':24, 'world.n_test':24, 'world.n_ood':12,
        'model.n_layer':1, 'model.n_embd':32, 'model.n_head':2, 'sft.updates':4, 'reward.updates':4, 'reward.n_normalise':16, 'dpo.updates':3, 'dpo.n_pairs':60,
        'ppo.updates':2, 'ppo.batch_size':6, 'ppo.max_new_tokens':10, 'ppo.checkpoint_every':1, 'grpo.updates':2, 'grpo.batch_size':3, 'grpo.group_size':6, 'grpo.checkpoint_every':1,
        'grpo.max_new_tokens':10, 'eval.n_prompts':12, 'eval.max_new_tokens':10, 'eval.batch_size':12, 'sft.checkpoint_every':2})
    base.update(sets)
    return load_config('demo', [f'{k}={"null" if v is None else v}' for k,v in base.items()])


def reset_accelerate():
    from accelerate.state import AcceleratorState,GradientState
    AcceleratorState._reset_state(True); GradientState._reset_state()


def stages(a):
    "Every stage through the command's own Line, in a temporary run folder"
    import shutil,tempfile
    faults = []
    with PretendGPU(a.kind, tuple(a.capability)) as gpu:
        reset_accelerate()
        from rlhf_nb import pipeline
        from rlhf_nb.run import Run
        d = tempfile.mkdtemp()
        try:
            line = pipeline.Line(Run(d+'/run', tiny_config(a.precision, 'mps' if a.kind=='mps' else 'auto')))
            print(f'device {line.acc.device}, precision {line.acc.mixed_precision}, scaler {line.acc.scaler is not None}')
            names = ['sft','reward','last_token','dpo','ppo','grpo','frontier','overoptimise','evaluate','judge','failures','analyze']
            for s in a.only or names:
                def f():
                    gpu.reset_peak(); pipeline.run_stages(line, [s], lambda x: None)
                with gpu.phase(s): ok = _attempt(s, f, faults)
                gc.collect()
                if ok: print(f'      left on the device after it: {gpu.now/1e6:.2f} MB; peak {gpu.peak/1e6:.2f} MB at {gpu.peak_at}; {gpu.launches[s]} launches, {sum(v for k,v in gpu.syncs.items() if k[0]==s)} syncs')
            def generate(): line.records(['\n\nHuman: What is the colour of the sky?\n\nAssistant:'])
            _attempt('generate (records)', generate, faults)
        finally: shutil.rmtree(d)
    print(f'{len(faults)} faults: {", ".join(faults) or "none"}')
    return faults


def app(a):
    "The page, asked over HTTP: its models are on the GPU, and its answers are the CPU's"
    os.environ['GRADIO_ANALYTICS_ENABLED'] = '0'
    import tempfile
    from gradio_client import Client
    from rlhf_nb.app import launch
    from rlhf_nb.desk import Desk
    from rlhf_nb.load import mk_policy,save_model
    from rlhf_nb.models import mk_reward_model
    from rlhf_nb.run import Run
    from rlhf_nb.world import make_world,world_tokenizer
    asked = [('Hello?', n, t) for n in (1,3) for t in (1.,0.)]
    with tempfile.TemporaryDirectory() as d:
        run = Run(d+'/run', tiny_config(**{'model.n_embd':16}))
        tok = world_tokenizer(make_world(run.config.world, 0), 400)
        for i,k in enumerate(('reference','ppo_model','dpo_model')): save_model(mk_policy(run.config.model, tok, i), tok, run/k)
        save_model(mk_reward_model(mk_policy(run.config.model, tok), 'last_token', 1), tok, run/'reward_model')
        with PretendGPU(a.kind, tuple(a.capability)) as gpu:
            page = launch(d+'/run', port=0, inline=False)
            while page.desk.state=='loading': time.sleep(.05)
            if page.desk.problems: raise DeviceError('; '.join(page.desk.problems))
            where = {str(p.policy.device) for p in page.desk.players.values()}
            client = Client(page.local_url, verbose=False)
            got = [client.predict(q, None, t, 9, 0, n, api_name='/compare') for q,n,t in asked]
            page.close()
            assert where=={gpu.name()} and sum(gpu.launches.values())>1000, (where, gpu.launches)
        desk = Desk(d+'/run'); desk.load()
        for (q,n,t),c in zip(asked, got):
            *_,want = desk.compare(desk.ask(f'\n\nHuman: {q}\n\nAssistant:', None, t, 9, 0, n))
            assert c['state']==want['state']=='done' and list(c['answers'])==['reference','ppo','dpo'], c
            for k,o in want['answers'].items():
                assert all(c['answers'][k][x]==o[x] for x in ('response','n_tokens','finished')), (k, o, c['answers'][k])
                for x in ('reward','kl'): assert abs(c['answers'][k][x]-o[x])<1e-4, (k, x, o[x], c['answers'][k][x])
    print(f'{len(asked)} comparisons'); return []


class Killed(BaseException): pass


def resume(a):
    "Each stage killed between two checkpoints, and gone on with: the weights and the log of one that was left alone"
    import json,tempfile
    from unittest.mock import patch
    faults = []
    with PretendGPU(a.kind, tuple(a.capability)),tempfile.TemporaryDirectory() as d:
        reset_accelerate()
        from rlhf_nb import pipeline
        from rlhf_nb.run import Run
        from rlhf_nb.train import StageLog
        names = a.only or ['sft','reward','dpo','ppo','grpo']
        each = dict(updates=5, checkpoint_every=2, eval_every=2)
        config = tiny_config(a.precision, 'mps' if a.kind=='mps' else 'auto', **{f'{k}.{x}':v for k in names for x,v in each.items()})
        def train(stage, folder, again): pipeline.run_stages(pipeline.Line(Run(f'{d}/{folder}', config, again)), [stage], lambda x: None)
        add = StageLog.add
        def killed(log, row):
            if row['update']==3: raise Killed
            add(log, row)
        def logged(folder, stage): return [{k:v for k,v in json.loads(r).items() if 'seconds' not in k and k!='peak_memory'} for r in open(Run(f'{d}/{folder}').log(stage))]
        def same(stage):
            train(stage, 'alone', stage!=names[0])
            with patch.object(StageLog, 'add', killed):
                try: train(stage, 'killed', stage!=names[0])
                except Killed: pass
                else: raise AssertionError('it was not killed')
            assert len(logged('killed', stage))==3 and Run(f'{d}/killed').checkpoint(stage).exists()
            train(stage, 'killed', True)
            assert logged('alone', stage)==logged('killed', stage), 'other rows'
            one,other = (Run(f'{d}/{k}').made(stage) for k in ('alone','killed'))
            for f in one.glob('*.safetensors'): assert f.read_bytes()==(other/f.name).read_bytes(), f.name
            assert list(one.glob('*.safetensors'))
        for s in names: _attempt(s, lambda: same(s), faults)
    return faults


def library(a):
    "Calls as a notebook makes them: models come from load_policy (CPU), the accelerator is the default one (the GPU)"
    import tempfile
    from copy import deepcopy
    faults = []
    with PretendGPU(a.kind, tuple(a.capability)):
        reset_accelerate()
        from rlhf_nb.config import DPOConfig,GRPOConfig,PPOConfig,RewardConfig,SFTConfig,ModelConfig,WorldConfig,EvalConfig
        from rlhf_nb.template import tokenize_prompts,tokenize_sft
        from rlhf_nb.data import tokenize_pairs
        from rlhf_nb.dpo import train_dpo
        from rlhf_nb import stats
        from rlhf_nb.frontier import best_of_n,gibbs
        from rlhf_nb.evaluate import sample_records
        from rlhf_nb.failures import change
        from rlhf_nb.grpo import train_grpo
        from rlhf_nb.models import exact_kl,log_probs,mk_reward_model,mk_value_model,scores,values,check_forward
        from rlhf_nb.load import load_policy,mk_policy,save_model
        from rlhf_nb.ppo import train_ppo
        from rlhf_nb.reward import accuracy,by_length,calibration,normalise,train_reward
        from rlhf_nb.sampling import sample
        from rlhf_nb.sources import mk_scorer
        from rlhf_nb.rollout import bandit,bandit_probs
        from rlhf_nb.sft import generate_plain,train_sft
        from rlhf_nb.train import mk_accelerator
        from rlhf_nb.world import make_world,world_tokenizer
        world = make_world(WorldConfig(n_corpus=300, n_facts=40, n_pairs=80, n_dev=12, n_test=12, n_ood=6)); tok = world_tokenizer(world, 400)
        m = ModelConfig(n_layer=1, n_embd=32, n_head=2)
        acc = mk_accelerator(a.precision, 'mps' if a.kind=='mps' else 'auto')
        with tempfile.TemporaryDirectory() as d:
            save_model(mk_policy(m, tok), tok, d+'/lm')
            new = lambda: load_policy(d+'/lm')[0]
            def other():
                m = new()
                for p in m.parameters(): p.data += .1*torch.randn_like(p)
                return m
            def mk_scores(tok, mk_scorer): return lambda m,b: mk_scorer([(1.,(m,tok)),(.5,excited)], tok)(b.plus(finished=b.mask.any(-1)))
            sft,pairs,prompts = tokenize_sft(world.corpus, tok, 64, 64),tokenize_pairs(world.train, tok, 64, 64),tokenize_prompts([o['prompt'] for o in world.train], tok, 64)
            excited = lambda ps,rs,fs: [min(3, r.count('!')) for r in rs]
            g,p = dict(updates=2, batch_size=3, group_size=3, max_new_tokens=6),dict(updates=2, batch_size=4, max_new_tokens=6)
            on = lambda x: x.to(acc.device)
            def same(f, *ms):
                "`f(*models, batch)`: models and batch each on either device give the CPU's numbers, on the batch's device"
                want = f(*ms, pairs[:4])
                for where in itertools.product((False,True), repeat=len(ms)+1):
                    *mods,b = [on(deepcopy(x) if i<len(ms) else x) if w else x for i,(x,w) in enumerate(zip((*ms,pairs[:4]), where))]
                    got = f(*mods, b)
                    if got.device!=b.device: raise DeviceError(f'the batch is on {b.device}, the answer on {got.device} ({where})')
                    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-4)
            def statistics():
                "Of rewards and points on the device: the CPU's numbers, whatever lies where"
                x,y = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
                points,keys,longer = stats.score_points(x, y).float(),[i%50 for i in range(180)],(x-y+torch.randn(60, 3)).mul(9).round()
                fs = [lambda f: stats.mean_ci(f(x)), lambda f: stats.share_ci(f(x.sigmoid())), lambda f: stats.paired_test(f(x-y)), lambda f: stats.paired_test(f(x[:8]-y[:8])),
                      lambda f: stats.win_rate(f(x), y), lambda f: stats.tally(f(points)), lambda f: stats.clustered_share(f(points.flatten()), keys), lambda f: stats.clustered_mean(f(x.flatten()), keys),
                      lambda f: stats.clustered_difference(f(points.flatten()), points.flatten(), keys), lambda f: stats.length_controlled(f(points), longer), lambda f: change(f(points), points.roll(1, 0)),
                      lambda f: best_of_n(f(x.repeat(1, 3)), y.repeat(1, 3)), lambda f: gibbs(x, f(y)), lambda f: accuracy(f(x), points[:,0]>0), lambda f: accuracy(x, f(points[:,0])>0),
                      lambda f: calibration(f(x)), lambda f: by_length(f(x[:20,:2]), pairs[:20]), lambda f: by_length(x[:20,:2], f(pairs[:20]))]
                for i,f in enumerate(fs): assert f(on)==f(lambda o: o), i
            cases = {
              'statistics of what is on the device': statistics,
              'log_probs, exact_kl, scores, values: the CPU\'s numbers, where the batch is': lambda: (same(log_probs, new()), same(exact_kl, other(), new()),
                  same(scores, mk_reward_model(new())), same(scores, mk_reward_model(new(), 'log_prob')), same(values, mk_reward_model(new())),
                  same(mk_scores(tok, mk_scorer), mk_reward_model(new()))),
              'train_sft, model from load_policy': lambda: train_sft(new(), sft, SFTConfig(updates=2), acc=acc),
              'train_reward last_token': lambda: train_reward(mk_reward_model(new()), pairs, RewardConfig(updates=2), acc=acc),
              'train_reward log_prob': lambda: train_reward(mk_reward_model(new(), 'log_prob'), pairs, RewardConfig(updates=2), acc=acc),
              'scores of a fresh log_prob head on a policy that is on the device': lambda: scores(mk_reward_model(on(new()), 'log_prob'), pairs[:4]),
              'scores of a fresh last_token head on such a policy': lambda: scores(mk_reward_model(on(new())), pairs[:4]),
              'train_dpo, cached, reference on the CPU': lambda: train_dpo(new(), new(), pairs, DPOConfig(updates=2), acc=acc),
              'train_dpo, live reference on the CPU': lambda: train_dpo(new(), new(), pairs, DPOConfig(updates=2, cache_reference=False), acc=acc),
              'train_dpo, live reference on the device': lambda: train_dpo(new(), on(new()), pairs, DPOConfig(updates=2, cache_reference=False), acc=acc),
              'train_grpo, reference on the CPU': lambda: train_grpo(new(), new(), mk_scorer(excited, tok), prompts, GRPOConfig(**g), acc=acc),
              'train_grpo, scores on the CPU by a function of its own': lambda: train_grpo(new(), new(), lambda b: torch.zeros(b.shape[:2]), prompts, GRPOConfig(**g), acc=acc, dev=prompts[:4]),
              'train_grpo, reference on the device': lambda: train_grpo(new(), on(new()), mk_scorer(excited, tok), prompts, GRPOConfig(**g), acc=acc),
              'train_grpo, group of 6, in pieces': lambda: train_grpo(new(), on(new()), mk_scorer(excited, tok), prompts, GRPOConfig(**{**g, 'group_size':6, 'micro_tokens':128}), acc=acc),
              'train_grpo, reward model on the CPU': lambda: train_grpo(new(), on(new()), mk_scorer((mk_reward_model(new()),tok), tok), prompts, GRPOConfig(**g), acc=acc),
              'train_grpo, silent groups drawn again, sources normalised': lambda: train_grpo(new(), on(new()), mk_scorer([(1.,excited),(.5,lambda p,r,f: [len(o)//9 for o in r])], tok), prompts, GRPOConfig(**g, loss_type='cispo', ratio='sequence', baseline='leave_one_out', normalise_each=True, resample_silent=4), acc=acc, dev=prompts[:4]),
              'train_ppo, reference on the CPU': lambda: train_ppo(new(), mk_value_model(new()), new(), mk_scorer(excited, tok), prompts, PPOConfig(**p), acc=acc),
              'train_ppo, reference on the device': lambda: train_ppo(new(), mk_value_model(new()), on(new()), mk_scorer(excited, tok), prompts, PPOConfig(**p), acc=acc),
              'train_ppo, value model from the reward model': lambda: (lambda rm: train_ppo(new(), mk_value_model(new(), rm), on(new()), mk_scorer((rm,tok), tok), prompts, PPOConfig(**p, value_warmup=1), acc=acc))(on(mk_reward_model(new()))),
              'padded forward on the device': lambda: log_probs(on(load_policy(d+'/lm', forward='padded')[0]), pairs[:3]),
              'padded decode on the device': lambda: sample(on(load_policy(d+'/lm', forward='padded')[0]), prompts[:3], 2, 5),
              'check_forward on the device': lambda: check_forward(on(new())),
              'exact_kl, both on the device': lambda: exact_kl(on(new()), on(new()), pairs[:3]),
              'exact_kl, reference on the CPU': lambda: exact_kl(on(new()), new(), pairs[:3]),
              'sample, slice by slice': lambda: sample(on(new()), prompts[:5], 3, 6, memory=1),
              'sample n=1,3,6, temperature 0': lambda: [sample(on(new()), prompts[:5], n, 6, t) for n,t in ((1,1.),(3,.7),(6,0.))],
              'generate_plain on the device': lambda: generate_plain(on(new()), prompts[:3], tok, 5),
              'bandit, trained by the default accelerator': lambda: (lambda P: (train_grpo(P[0], P[1], P[3], [[0]], GRPOConfig(updates=2, batch_size=1, group_size=4, max_new_tokens=1), acc=acc), bandit_probs(P[0])))(bandit()),
              'bandit, all on the device': lambda: (lambda P: (train_grpo(P[0], on(P[1]), P[3], [[0]], GRPOConfig(updates=2, batch_size=1, group_size=4, max_new_tokens=1), acc=acc), bandit_probs(P[0])))(bandit()),
              'sample_records, scorer on the CPU': lambda: sample_records({'reference':on(new()), 'ppo':on(new())}, [o['prompt'] for o in world.test][:6], tok, mk_scorer((mk_reward_model(new()),tok), tok), o=EvalConfig(max_new_tokens=5)),
              'sample_records, reference on the CPU, policy on the device': lambda: sample_records({'reference':new(), 'ppo':on(new())}, [o['prompt'] for o in world.test][:6], tok, mk_scorer(excited, tok), o=EvalConfig(max_new_tokens=5)),
              'weighted scorers, reward model on the CPU': lambda: mk_scorer([(1.,(mk_reward_model(new()),tok)),(.5,excited)], tok)(sample(on(new()), prompts[:3], 1, 5)),
              'sample_records, all on the device, 3 samples': lambda: sample_records({'reference':on(new()), 'ppo':on(new())}, [o['prompt'] for o in world.test][:6], tok, mk_scorer((on(mk_reward_model(new())),tok), tok), o=EvalConfig(max_new_tokens=5, n_samples=3)),
              'best_of_n and gibbs on the device': lambda: (lambda b: (best_of_n(b, b), gibbs(b, b)))(on(torch.randn(12, 8))),
              'normalise': lambda: normalise(on(mk_reward_model(new())), sample(on(new()), prompts[:6], 1, 5)),
              'a second accelerator with another precision': lambda: mk_accelerator('bf16' if a.precision!='bf16' else 'fp32'),
              'an accelerator on the CPU after one on the device': lambda: mk_accelerator('fp32', 'cpu'),
            }
            for k,f in cases.items():
                if a.only and not any(o in k for o in a.only): continue
                _attempt(k, f, faults); acc.free_memory()
    print(f'{len(faults)} faults')
    return faults


def two_updates():
    "From here on a training ends after its second update, and what it has trained lies in a folder of its own"
    import tempfile
    import rlhf_nb.train
    steps = rlhf_nb.train.steps
    @functools.wraps(steps)
    def few(model, updates, *args, **kw): return itertools.islice(steps(model, itertools.islice(updates, 2), *args, **kw), 2)
    assert 'rlhf_nb.sft' not in sys.modules    # it would have the other one already
    rlhf_nb.train.steps = few
    tempfile.tempdir = tempfile.mkdtemp()


def notebooks(a):
    "Code cells, with the display machinery left out. `--quick`: trainings of two updates, of which not all that a notebook says is true; faults of devices alone count"
    import json
    from IPython.core.inputtransformer2 import TransformerManager
    os.environ.setdefault('MPLBACKEND', 'agg')
    bad,quick,slow = 0,'--quick' in a.files,'--slow' in a.files
    if quick: two_updates()
    for path in (f for f in a.files if not f.startswith('--')):
        nb = json.load(open(path)); here = os.getcwd(); faults = []
        os.chdir(os.path.dirname(os.path.abspath(path)))
        sys.path.insert(0, os.getcwd())
        ns,n,began = types.ModuleType('__main__'),0,time.process_time()
        ns.display,sys.modules['__main__'] = print,ns   # what a cell patches by its name is there, and nothing of this script
        ns.get_ipython = lambda: types.SimpleNamespace(run_line_magic=print, run_cell_magic=print, system=print)     # magics do nothing
        if not quick and 'small_reference' in json.dumps(nb):
            from rlhf_nb.sft import small_reference
            small_reference()      # on the CPU: it is kept for all notebooks
        with PretendGPU(a.kind, tuple(a.capability), watch=('rlhf_nb','<cell')):
            reset_accelerate()
            for i,c in enumerate(nb['cells']):
                src = ''.join(c['source'])
                if c['cell_type']!='code' or 'nbdev_export' in src or re.search(rf'^# ?\| ?({"" if slow else "slow|"}eval: false)', src, re.M): continue
                src = TransformerManager().transform_cell(src)       # a line of a text may begin as a magic does
                try:
                    n += 1
                    with contextlib.redirect_stdout(open(os.devnull, 'w')): exec(compile(src, f'<cell {i}>', 'exec'), vars(ns))
                except BaseException as e:
                    if isinstance(e, KeyboardInterrupt): raise
                    tb = [o for o in traceback.extract_tb(e.__traceback__) if 'pretend_gpu' not in o.filename and '/torch/' not in o.filename]
                    o = ([x for x in tb if 'rlhf_nb' in x.filename or '<cell' in x.filename] or tb)[-1]
                    if quick and not re.search('cuda|device|[Dd]evice', f'{type(e).__name__} {e}'): continue
                    if os.environ.get('PRETEND_TRACEBACK'): traceback.print_exc()
                    faults.append(f'cell {i}: {os.path.basename(o.filename)}:{o.lineno} {o.name}: {type(e).__name__}: {str(e)[:160]}')
        os.chdir(here); sys.path.pop(0)
        gc.collect(); print(f'{path}: {n} cells, {len(faults)} fail ({time.process_time()-began:.0f} CPU-seconds)', flush=True)
        for f in faults: print('   ', f, flush=True)
        bad += len(faults)
    return bad


def counts(a):
    "Synchronisations and launches of one of everything; 12 layers like GPT-2's, but narrow (their number does not depend on width or rows)"
    with PretendGPU(a.kind, tuple(a.capability)) as gpu:
        reset_accelerate()
        from rlhf_nb.config import DPOConfig,GRPOConfig,ModelConfig,PPOConfig,RewardConfig,SFTConfig,WorldConfig
        from rlhf_nb.template import tokenize_prompts,tokenize_sft
        from rlhf_nb.data import tokenize_pairs
        from rlhf_nb.dpo import dpo_step,reference_log_probs
        from rlhf_nb.evaluate import sample_with_kl
        from rlhf_nb.grpo import grpo_advantages,grpo_step
        from rlhf_nb.layout import Layout
        from rlhf_nb.models import mk_reward_model,mk_value_model
        from rlhf_nb.load import mk_policy
        from rlhf_nb.ppo import ppo_advantages,ppo_step
        from rlhf_nb.reward import reward_step
        from rlhf_nb.sampling import decode
        from rlhf_nb.sources import mk_scorer
        from rlhf_nb.rollout import rollouts
        from rlhf_nb.sft import sft_step
        from rlhf_nb.train import mk_accelerator,steps
        from rlhf_nb.world import make_world,world_tokenizer
        from copy import deepcopy
        world = make_world(WorldConfig(n_corpus=300, n_facts=40, n_pairs=80, n_dev=12, n_test=12, n_ood=6)); tok = world_tokenizer(world, 400)
        acc = mk_accelerator(a.precision)
        lm = mk_policy(ModelConfig(n_layer=12, n_embd=32, n_head=2), tok).to(acc.device)
        prompts = tokenize_prompts([o['prompt'] for o in world.train], tok, 64)
        def show(name, per, what, details=True):
            n = sum(v for k,v in gpu.syncs.items() if k[0]==name)
            print(f'\n## {name}: {gpu.launches[name]/per:.1f} launches or more and {n/per:.2f} synchronisations per {what}')
            for (q,w,where),v in sorted(gpu.syncs.items(), key=lambda o: -o[1]):
                if q==name and details: print(f'   {v/per:8.2f}  {w:18s} {where}')
            top = [(k[1],v) for k,v in gpu.ops.most_common() if k[0]==name][:14]
            print('   ops: '+', '.join(f'{k} {v/per:.1f}' for k,v in top))
        for n in (8,1):
            it = decode(lm, prompts[:8], n, 24, 1., 0, stop_ids=())
            for t,_ in enumerate(it):
                if t==3: gpu.book.phase = f'decode n={n}'
                if t==19: gpu.book.phase = ''; break
            it.close(); show(f'decode n={n}', 16, 'token')
        k = f'prefill'
        with gpu.phase(k): next(decode(lm, prompts[:8], 8, 4))
        show(k, 1, 'call (8 prompts)', True)
        with gpu.phase('comparison'): sample_with_kl({'reference':lm, 'ppo':deepcopy(lm), 'grpo':deepcopy(lm), 'dpo':deepcopy(lm)}, prompts[:8], 1, 16)
        show('comparison', 16, 'token of four models')
        pairs,sft = tokenize_pairs(world.train, tok, 64, 64)[:16],tokenize_sft(world.corpus, tok, 64, 64)[:16]
        kw = dict(updates=3, micro_tokens=10**6)
        ref = reference_log_probs(lm, pairs)
        def train(name, model, data, step, o):
            it = steps(model, (([data],{}) for _ in range(3)), step, o, 3, acc=acc)
            next(it); gpu.book.phase = name; next(it); gpu.book.phase = ''; it.close(); acc.free_memory(); show(name, 1, 'update of one micro-batch')
        train('sft', deepcopy(lm), sft, sft_step, SFTConfig(**kw))
        train('reward', mk_reward_model(lm), pairs, reward_step, RewardConfig(**kw))
        train('dpo', deepcopy(lm), pairs.plus(ref_sums=ref), lambda net,b,n: dpo_step(net, b, n, DPOConfig()), DPOConfig(**kw))
        excited = mk_scorer(lambda ps,rs,fs: [min(3, r.count('!')) for r in rs], tok)
        def rl(name, o, model, policy, prep, step, n):
            it = steps(model, rollouts(policy, lm, excited, prompts, o, prep, n, 1, acc=acc), step, o, 3, acc=acc)
            next(it); gpu.book.phase = name; next(it); gpu.book.phase = ''; it.close(); acc.free_memory(); show(name, 1, f'update ({o.max_new_tokens} tokens decoded, one micro-batch)')
        o = GRPOConfig(**kw, batch_size=8, max_new_tokens=16); pol = deepcopy(lm)
        rl('grpo', o, pol, pol, lambda b: grpo_advantages(b, o), lambda net,b,n: grpo_step(net, b, n, o), 8)
        o2 = PPOConfig(**kw, batch_size=16, max_new_tokens=16); pol,vm = deepcopy(lm),mk_value_model(lm)
        rl('ppo', o2, torch.nn.ModuleDict(dict(policy=pol, value=vm)), pol, lambda b: ppo_advantages(b, vm, o2), lambda net,b,n: ppo_step(net, b, n, o2), 1)
        k = 'layout'
        with gpu.phase(k): Layout(pairs.to(acc.device))
        show(k, 1, 'Layout of pairs')
    return []


def limits(a):
    "What a GPU may be asked: answers are the CPU's, a token of 12 layers and groups of 8 is 180 launches and an eighth of a synchronisation, a layout none"
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from tiny import batch,configs,lm
    from transformers import AutoModelForCausalLM,GPT2Config
    from rlhf_nb.adapters import adapt
    from rlhf_nb.config import LoraConfig
    from rlhf_nb.core import generator
    from rlhf_nb.layout import Layout,layout_of
    from rlhf_nb.models import log_probs
    from rlhf_nb.sampling import sample
    from rlhf_nb import writing
    b,sizes = batch(2, [22,35,19,28,40,24]),(1,4,8,writing.TOGETHER+1)
    def learned(m):
        for i,o in enumerate(m.pairs.values()): o.B.data.normal_(0, .1, generator=generator(1, i))
        return m
    models = {f'{kind}{" with an adapter"*low}':learned(adapt(lm(kind=kind), LoraConfig(r=4))) if low else lm(kind=kind) for kind in configs for low in (0,1)}
    want = {(k,n):sample(m, b.prompts, n, 20, 1., 3) for k,m in models.items() for n in sizes}
    with PretendGPU(a.kind, tuple(a.capability)) as gpu:
        for k,m in models.items():
            m.to('cuda')
            for n in sizes:
                got = sample(m, b.prompts, n, 20, 1., 3)
                assert got.device.type=='cuda' and got.tokens()==want[k,n].tokens() and got.finished.tolist()==want[k,n].finished.tolist(), (k,n)
                assert sample(m, b.prompts[2:3], n, 20, 1., 3).tokens()[0]==want[k,n].tokens()[2], (k,n,'alone')
                assert (got.old_log_probs.cpu()-want[k,n].old_log_probs).abs().max()<2e-5
        assert not all(o.finished.all() for o in want.values()) and any(o.finished.any() for o in want.values())
        c = GPT2Config(n_layer=12, n_embd=32, n_head=2, n_positions=128, vocab_size=5000, activation_function='gelu_pytorch_tanh', bos_token_id=1, eos_token_id=2)
        m = AutoModelForCausalLM.from_config(c).eval().to('cuda')
        for n,most in ((1,180),(8,180),(writing.TOGETHER+1,330)):
            seen = []
            sample(m, b.prompts, n, 2, stop_ids=())                  # what is looked at once
            with gpu.phase(f'write {n}'):
                L = writing.LOOK
                def watch(): seen.append((gpu.launches[f'write {n}'],sum(gpu.syncs.values())))
                writing.write(m, b.prompts, torch.rand(len(b), n, 4*L+1, dtype=torch.float64), (), watch=watch)
            launches,syncs = ([y-x for x,y in zip(o, o[L:])] for o in zip(*seen))   # of eight tokens
            if os.environ.get('PRETEND_OPS'): print({k[1]:v/(4*L) for k,v in gpu.ops.most_common() if k[0]==f'write {n}'})
            print(f'groups of {n}: {max(launches)/L:.1f} launches and {max(syncs)/L:.3f} synchronisations a token')
            assert max(launches)/L<=most and max(syncs)<=1, sorted(gpu.syncs.items())
        there = b.to('cuda')
        with gpu.phase('layout'): Layout(there); Layout(there[[2,0]])
        with gpu.phase('pass'): log_probs(m, there[1:3]).sum().backward()
        n = {k:sum(v for q,v in gpu.syncs.items() if q[0]==k) for k in ('layout','pass')}
        print(n); assert n==dict.fromkeys(n, 0), [q for q in gpu.syncs if q[0] in n]
        assert layout_of(there) is layout_of(there.plus(x=there.mask))
    return []


def waits_of_rl(gpu, waits):
    """An update of PPO or GRPO waits for: a look at who still writes (every 8 tokens), the answers, their rewards, the row of the log, each
    optimizer step; and to see that a reward model's scores are finite, or what each of several sources said"""
    from copy import deepcopy
    from functools import partial
    from rlhf_nb.config import GRPOConfig,ModelConfig,PPOConfig,WorldConfig
    from rlhf_nb.grpo import grpo_advantages,grpo_step
    from rlhf_nb.load import mk_policy
    from rlhf_nb.models import mk_reward_model,mk_value_model
    from rlhf_nb.ppo import ppo_advantages,ppo_step
    from rlhf_nb.rollout import rollouts
    from rlhf_nb.sources import mk_scorer
    from rlhf_nb.template import tokenize_prompts
    from rlhf_nb.train import mk_accelerator,steps
    from rlhf_nb.world import make_world,world_tokenizer
    world = make_world(WorldConfig(n_corpus=300, n_facts=40, n_pairs=80, n_dev=12, n_test=12, n_ood=6))
    tok = world_tokenizer(world, 400)
    prompts = tokenize_prompts([o['prompt'] for o in world.train], tok, 64)
    lm = mk_policy(ModelConfig(n_layer=1, n_embd=32, n_head=2), tok).to('cuda')
    long,holes = lambda p,r,f: [float(len(o)) for o in r],lambda p,r,f: [None if len(o)%3==0 else 1. for o in r]
    scores = dict(function=(mk_scorer(long, tok),0), holes=(mk_scorer(holes, tok),0), model=(mk_scorer((mk_reward_model(lm),tok), tok),1),
                  two=(mk_scorer([(1.,long),(.5,holes)], tok),1), own=(lambda b: b.lengths.float(),0))
    kw = dict(updates=2, batch_size=6, max_new_tokens=12)
    for precision,score,tokens,ppo in itertools.product(('fp32','bf16'), scores, (10**6,100), (False,True)):
        acc,policy,(f,more) = mk_accelerator(precision),deepcopy(lm),scores[score]
        if ppo:
            o = PPOConfig(**kw, micro_tokens=tokens, epochs=2, mini_batches=2); value = mk_value_model(lm)
            model,draw = torch.nn.ModuleDict(dict(policy=policy, value=value)),partial(rollouts, prepare=lambda b: ppo_advantages(b, value, o), epochs=2, mini_batches=2)
        else:
            o = GRPOConfig(**kw, micro_tokens=tokens, group_size=4, mask_truncated=score=='own', normalise_each=score=='two', kl_in='reward')
            model,draw = policy,partial(rollouts, prepare=lambda b: grpo_advantages(b, o), n=4)
        it = steps(model, draw(policy, lm, f, prompts, o, acc=acc), partial(ppo_step if ppo else grpo_step, o=o), o, 2, acc=acc)
        next(it); k = f'{"ppo" if ppo else "grpo"} {score} {precision} {tokens}'
        with gpu.phase(k): row = next(it)
        it.close()
        (count,where),looks = waits(gpu, k),1
        assert count==looks+3+row['steps']+more and (row['steps']==4 or not ppo), (k,count,row['steps'],where)
    print('an update of PPO or GRPO: 1 synchronisation for 8 tokens, 3 for the rollout (4 with a reward model or several sources), 1 for an optimizer step')


def training(a):
    """What an update may ask of a GPU: the host waits once, for its row of the log, however many micro-batches there are and wherever the data
    lie; in RL for its rollout too (`waits_of_rl`). Killed and resumed in fp16, among updates that overflow, it ends with the same bits; a stage has a peak of memory of its own"""
    import tempfile
    from copy import deepcopy
    from functools import partial
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from tiny import batch,lm
    from rlhf_nb.config import DPOConfig,Optim
    from rlhf_nb.core import Batch
    from rlhf_nb.dpo import dpo_step,reference_log_probs
    from rlhf_nb.models import log_probs,mk_reward_model
    from rlhf_nb.reward import reward_step
    from rlhf_nb.run import Run
    from rlhf_nb.sft import sft_step
    from rlhf_nb.train import fit,measured,mk_accelerator,own_pieces,steps
    policy,pairs = lm(),batch(2, [22,35,19,28,40,24])
    answers = Batch.from_tokens(pairs.prompts, [o[:1] for o in pairs.tokens()])
    def waits(gpu, k): return sum(v for q,v in gpu.syncs.items() if q[0]==k),sorted((q,v) for q,v in gpu.syncs.items() if q[0]==k)
    with PretendGPU(a.kind, tuple(a.capability)) as gpu:
        reset_accelerate()
        exact = log_probs(policy, pairs)
        policy.to('cuda')
        for dt,off in ((torch.bfloat16,.1),(torch.float16,.02)):    # half in, float32 out: the product that only a GPU has
            with torch.autocast('cuda', dtype=dt),gpu.phase(f'product {dt}'): got = log_probs(policy, pairs)
            assert 0<(got-exact).abs().max()<off, (dt,(got-exact).abs().max())
        pairs = pairs.plus(ref_sums=reference_log_probs(policy, pairs).cpu())
        stages = dict(sft=(policy,answers,sft_step), reward=(mk_reward_model(policy),pairs,reward_step), dpo=(policy,pairs,partial(dpo_step, o=DPOConfig())))
        for name,(model,data,step) in stages.items():
            for precision,there,tokens in itertools.product(('fp32','bf16','fp16'), (False,True), (10**6,100)):
                acc,o,b = mk_accelerator(precision),Optim(micro_tokens=tokens),data.to('cuda') if there else data
                n = len(own_pieces(b, tokens))
                it = steps(deepcopy(model), (([b[:]],{}) for _ in range(2)), step, o, 2, acc=acc)
                next(it); k = f'{name} {precision} {"there" if there else "here"} {n}'
                with gpu.phase(k): next(it)
                with gpu.phase(k+' dev'): measured(model, step, b, o)
                it.close()
                for q in (k,k+' dev'):
                    count,where = waits(gpu, q)
                    assert count==1 and (n>1)==(tokens<10**6), (q,where)
        print('an update of SFT, reward model or DPO: 1 synchronisation, however many micro-batches')
        waits_of_rl(gpu, waits)

        def steep(net, b, n):
            loss,s = sft_step(net, b, n)
            return loss*2**12,s
        def run_of(stop=None, run=None, scale=2.**12):
            model,acc,o = deepcopy(policy),mk_accelerator('fp16'),Optim(lr=1e-3, checkpoint_every=2)
            def updates(start):
                for i in range(start, 10):
                    if i==stop: raise KeyboardInterrupt
                    yield [answers],{}
            return model,fit(model, updates, steep, o, 10, run, 'sft', acc=acc)
        model,rows = run_of()
        skipped = [r['skipped'] for r in rows]
        assert 0<sum(skipped)<10, skipped
        for stop in (sum(skipped)-1 or 1,7):
            with tempfile.TemporaryDirectory() as d:
                run = Run(d+'/run', tiny_config('fp16'))
                try: run_of(stop, run)
                except KeyboardInterrupt: pass
                again,got = run_of(run=run)
            assert len(got)==10 and all({k:r[k] for k in r if 'seconds' not in k and k!='peak_memory'}=={k:g[k] for k in r if 'seconds' not in k and k!='peak_memory'}
                                        for r,g in zip(rows, got)), stop
            assert all(torch.equal(p, q) for p,q in zip(model.state_dict().values(), again.state_dict().values())), stop
        print(f'fp16: {sum(skipped)} of 10 updates skipped, resumed with the same bits')
        big = torch.zeros(1<<24, device='cuda'); del big
        peak = run_of()[1][-1]['peak_memory']
        assert gpu.now<peak<4<<24, peak
    return []


def selftest(a):
    with PretendGPU() as gpu:
        def raises(f):
            try: f()
            except (DeviceError,TypeError): return True
            return False
        x,i = torch.arange(6., device='cuda').view(2,3),torch.tensor([1])
        assert x.device==torch.device('cuda:0') and x.is_cuda and not i.is_cuda and (x+1).is_cuda and x[0].device.type=='cuda'
        assert raises(lambda: x+torch.ones(3)) and raises(lambda: torch.ones(3)[torch.tensor([0], device='cuda')]) and raises(lambda: x.numpy())
        assert (x+torch.tensor(1.)).is_cuda and x[i].is_cuda and not x.cpu().is_cuda and raises(lambda: torch.cat([x, torch.zeros(1,3)]))
        assert raises(lambda: torch.randn(2, device='cuda', generator=torch.Generator()))
        m = torch.nn.Linear(3, 2); opt = torch.optim.AdamW(m.parameters(), fused=True); m.to('cuda')
        assert m.weight.is_cuda and raises(lambda: m(torch.ones(1,3)))
        m(x).sum().backward(); opt.step(); assert m.weight.grad.is_cuda and opt.state[m.weight]['exp_avg'].is_cuda
        gpu.reset(); float(x.sum()); bool(x.any()); x.tolist(); x[x>2]; x.nonzero(); [0,1][torch.tensor(1, device='cuda')]; torch.tensor([1], device='cuda'); x[x>2] = 0
        assert sum(gpu.syncs.values())==8, gpu.syncs
        a0 = gpu.now; y = torch.empty(1<<20, device='cuda'); assert gpu.now-a0==4<<20; del y; assert gpu.now==a0
        import copy; assert copy.deepcopy(m).weight.is_cuda and copy.deepcopy(x).is_cuda
        with torch.autocast('cuda', dtype=torch.bfloat16): assert m(x).dtype==torch.bfloat16 and torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda')==torch.bfloat16
        w = torch.ones(2, requires_grad=True); (w.to('cuda').exp().cpu()*2).sum().backward(); assert not w.grad.is_cuda and torch.equal(w.grad, 2*w.detach().exp())
        v = torch.ones(2, device='cuda', requires_grad=True); (v.cpu()**2).sum().backward(); assert v.grad.is_cuda and v.grad.tolist()==[2,2]
        with torch.random.fork_rng([torch.device('cuda:0')]): torch.rand(1)
        s = torch.amp.GradScaler('cuda'); assert s.scale(x.sum()).item()==x.sum().item()*65536
    assert not torch.cuda.is_available() and not torch.zeros(1).is_cuda
    with PretendGPU('mps'):
        try: torch.zeros(2, dtype=torch.float64).to('mps'); assert False
        except TypeError: pass
    print('selftest passed'); return []


def memory(a):
    "The preset `full` with models of GPT-2's shape: the largest step of each stage, its most bytes beside the plan's"
    from copy import deepcopy
    from transformers import GPT2Config,GPT2LMHeadModel
    from rlhf_nb import ledger,plan
    from rlhf_nb.settings import mk_config
    from rlhf_nb.evaluate import sample_with_kl
    from rlhf_nb.frontier import best_ns
    from rlhf_nb.models import mk_reward_model,mk_value_model,scores
    from rlhf_nb.sampling import sample
    from rlhf_nb.train import Net,counts as counted,micro_batches,mk_accelerator
    c,shape = mk_config({'preset':'full'}),GPT2Config()
    names = a.only or ['sft','reward','dpo','ppo','grpo','frontier','evaluate']
    want = {k:plan.need_of(k, c, shape) for k in names}
    faults = []
    with PretendGPU(a.kind, tuple(a.capability)) as gpu:
        reset_accelerate()
        acc = mk_accelerator(a.precision)
        first = GPT2LMHeadModel(ledger._fused(deepcopy(shape))).eval()             # as models are loaded
        def lm(): return deepcopy(first).to(acc.device)
        def asked(n): return [[i+1]*c.data.max_prompt for i in range(n)]
        def learn(stage):
            "Two micro-batches, a step of AdamW, and another, so that all there is has been there at once; then what it samples"
            o,policy = getattr(c, stage),lm()
            if stage=='reward': net = mk_reward_model(policy).to(acc.device)
            elif stage=='ppo': net = torch.nn.ModuleDict(dict(policy=policy, value=mk_value_model(policy).to(acc.device)))
            else: net = policy
            # the reference of RL, and the reward model
            beside = [lm() for _ in range(2*(stage in ('ppo','grpo')))]
            b = ledger._with_fields(ledger._batch(ledger.largest(stage, c)), stage).to(acc.device)
            piece = b[max(micro_batches(b, o.micro_tokens), key=len)]
            opt = torch.optim.AdamW(net.parameters(), lr=1e-6)
            step = ledger._step_of(stage, c)
            for i in range(3):
                loss,_ = step(Net(net, acc.autocast), piece, counted(b))
                loss.backward()
                if i==1: opt.step()
            del loss
            opt.step()
            opt.zero_grad()
            if beside:
                sample(policy, asked(b.shape[0]), b.shape[1], o.max_new_tokens, stop_ids=())
        # measured in the precision of the weights, as the stages do
        def frontier():
            "As many prompts as are sampled at once"
            m,rm,n = lm(),mk_reward_model(lm()).to(acc.device),max(best_ns)
            k = ledger.at_once(100, ledger.decode_bytes(m, c.data.max_prompt, n, c.eval.max_new_tokens))
            b = sample(m, asked(k), n, c.eval.max_new_tokens, stop_ids=())
            with torch.no_grad():
                for rows in micro_batches(b, 16384): scores(rm, b[rows])
        def evaluate():
            "The same of four models, the reference reading along"
            ms,rm = {k:lm() for k in ('reference','ppo','grpo','dpo')},mk_reward_model(lm()).to(acc.device)
            bs = sample_with_kl(ms, asked(40), 1, c.eval.max_new_tokens, c.eval.temperature, 0)
            with torch.no_grad():
                for b in bs.values(): scores(rm, b)
        for k in names:
            gc.collect()
            gpu.reset_peak()
            before,began = gpu.now,time.process_time()
            dict(frontier=frontier, evaluate=evaluate).get(k, lambda: learn(k))()
            got,planned = gpu.peak-before,want[k].peak
            print(f'{k}: counted {got/1e9:.2f} GB at {gpu.peak_at}, planned {planned/1e9:.2f} ({got/planned-1:+.0%}); {time.process_time()-began:.0f} CPU-seconds', flush=True)
            if got>7.5e9: faults.append(k)
    print(f'{len(faults)} stages above 7.5 GB: {", ".join(faults) or "none"}')
    return faults


modes = 'selftest','stages','app','resume','library','limits','training','notebooks','counts','memory'


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('what', choices=[*modes,'script'])
    p.add_argument('files', nargs=argparse.REMAINDER, default=[])
    p.add_argument('--precision', default='fp32', choices=['auto','fp32','bf16','fp16']); p.add_argument('--kind', default='cuda', choices=['cuda','mps'])
    p.add_argument('--capability', type=int, nargs=2, default=(8,0)); p.add_argument('--only', nargs='+')
    argv = sys.argv[1:]
    # options may stand behind the verb
    opts = argparse.ArgumentParser(add_help=False)
    opts.add_argument('--precision', default='fp32'); opts.add_argument('--kind', default='cuda'); opts.add_argument('--capability', type=int, nargs=2, default=(8,0)); opts.add_argument('--only', nargs='+')
    if argv and argv[0]!='script':
        o,rest = opts.parse_known_args(argv[1:])
        a = argparse.Namespace(what=argv[0], files=rest, **vars(o))
        if a.what not in modes: p.print_help(); sys.exit(2)
    else:
        if not argv: p.print_help(); sys.exit(2)
        a = argparse.Namespace(what='script', files=argv[1:], precision='fp32', kind='cuda', capability=(8,0), only=None)
    torch.set_num_threads(1)
    if a.what=='script':
        import runpy
        sys.argv = a.files
        with PretendGPU(a.kind, tuple(a.capability), watch=('rlhf_nb',a.files[0])) as gpu: runpy.run_path(a.files[0], run_name='__main__'); gpu.report()
        return
    bad = globals()[a.what](a)
    sys.exit(1 if bad else 0)


if __name__=='__main__': main()
