"""NumPy and torch arrays on their way in and out. What NumPy lacks, bfloat16 and fp8, is uint16 and uint8 there."""
import sys

import numpy

from . import _core
from .errors import UsageError


def torch_if_used():
    """torch when somebody has imported it: nobody else can have handed us a tensor."""
    return sys.modules.get("torch")


def is_torch(array) -> bool:
    torch = torch_if_used()
    return torch is not None and isinstance(array, torch.Tensor)


def as_array(value, what):
    """The array itself, or a NumPy array of what else there is (a list, an array of another library)."""
    if is_torch(value):
        return value.detach() if value.requires_grad else value
    if isinstance(value, numpy.ndarray):
        return value
    try:
        array = numpy.from_dlpack(value) if hasattr(value, "__dlpack__") else numpy.asarray(value)
    except (TypeError, ValueError, BufferError):
        array = None
    if array is None or array.dtype.hasobject:
        raise UsageError(f"{what} is a {type(value).__name__}; expected a NumPy array, a torch tensor, or what DLPack can turn into one")
    return array


def _small_float(array):
    """(view as unsigned integers, dtype) of elements that DLPack or the library cannot carry by themselves."""
    if is_torch(array):
        torch = torch_if_used()
        if array.dtype == torch.float8_e4m3fn:
            return array.view(torch.uint8), "float8_e4m3"
        return array, None
    if array.dtype.name in ("bfloat16", "float8_e4m3fn"):  # of ml_dtypes
        return array.view(f"uint{8 * array.dtype.itemsize}"), "bfloat16" if array.dtype.itemsize == 2 else "float8_e4m3"
    return array, None


def tensor(value, what, dtype=None):
    """(the array to keep alive, its _core.Tensor). dtype says what the elements mean where the array cannot."""
    array = as_array(value, what)
    shown, known = _small_float(array)
    try:
        return array, _core.Tensor(shown, dtype or known)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
    except TypeError:
        raise UsageError(f"{what} of dtype {array.dtype} cannot be read; view it as an integer type of the same size") from None


_CARRIED = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "uint16", "float8_e4m3fn"}


def opaque(value, what, dtype=None):
    """As tensor(), for elements that only travel: a type that the library does not know goes as bytes."""
    array = as_array(value, what)
    if dtype is None and str(array.dtype).removeprefix("torch.") not in _CARRIED:
        return array, tensor(array.view(torch_if_used().uint8 if is_torch(array) else numpy.uint8), what)[1]
    return tensor(array, what, dtype)


def writable(value, what, dtype=None):
    """As tensor(), for memory that results are written to."""
    if not is_torch(value) and not (isinstance(value, numpy.ndarray) and value.flags.writeable):
        raise UsageError(f"{what} is a {type(value).__name__} that cannot be written; expected a writable NumPy array or a torch tensor")
    return tensor(value, what, dtype)


def shown_as(array, dtype):
    """The result with the element type that went in."""
    return array if array is None or dtype is None or array.dtype == dtype else array.view(dtype)


class Frame:
    """Where results go: the framework and device of what came in."""

    _places = {}

    def __init__(self, array, device="cpu", device_index=0):
        self.is_torch = is_torch(array)
        key = (self.is_torch, device, device_index)
        if key not in self._places:
            framework = _core.Framework.torch if self.is_torch else _core.Framework.numpy
            self._places[key] = _core.Place(framework, device, device_index)
        self.place = self._places[key]
        self.dtype = array.dtype

    @property
    def float8(self):
        """How fp8 rows are shown: torch has a type for them."""
        return torch_if_used().float8_e4m3fn if self.is_torch else None

    def empty(self, shape, dtype):
        """Memory of the framework; dtype is one of ours."""
        if self.is_torch:
            torch = torch_if_used()
            return torch.empty(shape, dtype=getattr(torch, {"float8_e4m3": "float8_e4m3fn"}.get(dtype, dtype)))
        return numpy.empty(shape, {"bfloat16": "uint16", "float8_e4m3": "uint8"}.get(dtype, dtype))
