"""NumPy and torch arrays on their way in and out. What NumPy lacks, bfloat16 and fp8, is uint16 and uint8 there."""
import atexit
import sys

import numpy

from . import _core
from .errors import UsageError

_numpy_names = {}  # what a view of an element type means; dtypes hash faster than their names are made
_torch_names = {}
for _name in ("float64", "float32", "float16", "int64", "int32", "uint8"):
    _numpy_names[numpy.dtype(_name)] = _name
_numpy_names[numpy.dtype("uint16")] = "bfloat16"


def torch_if_used():
    """torch when somebody has imported it: nobody else can have handed us a tensor."""
    return sys.modules.get("torch")


def current_stream(device_index) -> int:
    """torch's current stream on a GPU, without the object that torch.cuda.current_stream() makes, which takes longer than a launch."""
    torch = sys.modules["torch"]
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device_index).cuda_stream if raw is None else raw(device_index)


def is_torch(array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _names_of_torch():
    if not _torch_names:
        torch = torch_if_used()
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8"):
            _torch_names[getattr(torch, name)] = name
        _torch_names[torch.bool], _torch_names[torch.float8_e4m3fn] = "uint8", "float8_e4m3"
    return _torch_names


def as_array(value, what):
    """The array itself, or a NumPy array of what else there is (a list, an array of another library)."""
    if isinstance(value, numpy.ndarray) or is_torch(value):
        return value
    try:
        array = numpy.from_dlpack(value) if hasattr(value, "__dlpack__") else numpy.asarray(value)
    except (TypeError, ValueError, BufferError):
        array = None
    if array is None or array.dtype.hasobject or array.dtype.kind in "US":
        raise UsageError(f"{what} is a {type(value).__name__}; expected a NumPy array, a torch tensor, or what DLPack can turn into one")
    return array


def on_cpu(value, what):
    """As as_array(), for what only the CPU computes."""
    array = as_array(value, what)
    if is_torch(array) and array.device.type != "cpu":
        raise UsageError(f"{what} is on {array.device}; this is computed on the CPU: pass {what}.cpu()")
    return array


def check_dtype(name, what):
    if not isinstance(name, str):
        raise UsageError(f"{what} = {name!r} is a {type(name).__name__}; expected a name, 'bfloat16' say")
    return name


def _view(array, dtype):
    if name := _torch_names.get(array.dtype):  # without DLPack, which takes torch longer than a small exchange
        return _core.Tensor(array, dtype or name, array.data_ptr(), array.element_size(), array.shape, array.stride())
    if is_torch(array):
        name = dtype or _names_of_torch().get(array.dtype)
        return None if name is None else _core.Tensor(array, name, array.data_ptr(), array.element_size(), array.shape, array.stride())
    if name := dtype or _numpy_names.get(array.dtype):
        return _core.Tensor(array, name)
    # bool, and the types of ml_dtypes, are shown as integers
    name = {"bool": "uint8", "bfloat16": "bfloat16", "float8_e4m3fn": "float8_e4m3"}.get(array.dtype.name)
    return None if name is None else _core.Tensor(array.view(f"uint{8 * array.dtype.itemsize}"), name)


def tensor(array, what, dtype=None):
    """The _core.Tensor of an array, which it keeps alive. dtype says what the elements mean where the array cannot."""
    if dtype is not None:
        check_dtype(dtype, "dtype")
    try:
        view = _view(array, dtype)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
    if view is None:
        raise UsageError(f"{what} is of dtype {array.dtype}; expected float64, float32, float16, bfloat16 (in NumPy uint16), int64, int32 or uint8")
    return view


def opaque(array, what, dtype=None):
    """As tensor(), for elements that only travel: a type that the library does not know goes as bytes."""
    if dtype is None and array.dtype not in _torch_names and array.dtype not in (_names_of_torch() if is_torch(array) else _numpy_names):
        array = array.view(torch_if_used().uint8 if is_torch(array) else numpy.uint8)
    return tensor(array, what, dtype)


def writable(array, what, dtype=None):
    """As tensor(), for memory that results are written to."""
    if not is_torch(array) and not (isinstance(array, numpy.ndarray) and array.flags.writeable):
        raise UsageError(f"{what} is a {type(array).__name__} that cannot be written; expected a writable NumPy array or a torch tensor")
    return tensor(array, what, dtype)


def shown_as(array, dtype):
    """The result with the element type that went in."""
    return array if array is None or dtype is None or array.dtype == dtype else array.view(dtype)


def frame_of(framework):
    """The Frame of a framework's name, on the CPU."""
    if framework not in ("numpy", "torch"):
        raise UsageError(f"framework = {framework!r}; expected 'numpy' or 'torch'")
    if framework == "torch":
        import torch  # noqa: F401
    return Frame.of_framework(framework == "torch")


class TorchMemory:
    """Rows and scales of a dispatch on a GPU in memory of torch's allocator, which is asked for it when their number is known."""

    def __init__(self, device_index):
        self._index, self._stream = device_index, current_stream(device_index)
        self.rows = self.scales = None

    def __call__(self, rows, row_bytes, scale_bytes):
        if current_stream(self._index) == self._stream:
            return self._allocate(rows, row_bytes, scale_bytes)
        torch = torch_if_used()  # the allocator hands memory on in the order of the stream that will write it
        with torch.cuda.stream(torch.cuda.ExternalStream(self._stream, device=self._index)):
            return self._allocate(rows, row_bytes, scale_bytes)

    def _allocate(self, rows, row_bytes, scale_bytes):
        torch = torch_if_used()
        self.rows = torch.empty((rows, row_bytes), dtype=torch.uint8, device=torch.device("cuda", self._index))
        if not scale_bytes:
            return self.rows.data_ptr(), 0
        self.scales = self.rows.new_empty((rows, scale_bytes))
        return self.rows.data_ptr(), self.scales.data_ptr()


class Frame:
    """Where results go: the framework and device of what came in."""

    _all = {}

    @staticmethod
    def of(array, device="cpu", device_index=0):
        return Frame.of_framework(is_torch(array), device, device_index)

    @staticmethod
    def of_framework(is_torch, device="cpu", device_index=0):
        key = is_torch, device, device_index
        if key not in Frame._all:
            Frame._all[key] = Frame(*key)
        return Frame._all[key]

    def __init__(self, is_torch, device, device_index):
        self.is_torch, self.device, self.device_index = is_torch, device, device_index
        self.place = _core.Place(_core.Framework.torch if is_torch else _core.Framework.numpy, device, device_index)

    @property
    def float8(self):
        """How fp8 rows are shown: torch has a type for them."""
        return torch_if_used().float8_e4m3fn if self.is_torch else None

    def empty(self, shape, dtype):
        """Memory of the framework; dtype is one of ours."""
        if self.is_torch:
            torch = torch_if_used()
            place = torch.device(self.device, self.device_index) if self.device == "cuda" else None
            return torch.empty(shape, dtype=getattr(torch, {"float8_e4m3": "float8_e4m3fn", "ue8m0": "uint8"}.get(dtype, dtype)), device=place)
        return numpy.empty(shape, {"bfloat16": "uint16", "float8_e4m3": "uint8", "ue8m0": "uint8"}.get(dtype, dtype))


atexit.register(Frame._all.clear)  # torch can keep modules beyond the end, and the C++ module misses whatever of it they hold
