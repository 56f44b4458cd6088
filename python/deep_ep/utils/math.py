"""Arithmetic that DeepEP's test programs use."""
import torch


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def align(x: int, y: int) -> int:
    return ceil_div(x, y) * y


def safe_div(a, b):
    """a / b, and 0 / 0 = 0."""
    return 0 if a == 0 and b == 0 else a / b


def calc_diff(x, y) -> float:
    """1 - the cosine similarity of x + 1 and y + 1, weighted by their sizes: 0 when they are equal."""
    x, y = x.double() + 1, y.double() + 1
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


def hash_tensor(t) -> int:
    return t.contiguous().view(torch.int).sum().item()


def count_bytes(*tensors) -> int:
    """Of tensors, and of tuples and lists of them; None counts nothing."""
    total = 0
    for one in tensors:
        total += 0 if one is None else count_bytes(*one) if isinstance(one, (tuple, list)) else one.numel() * one.element_size()
    return total


def _blocks(x):
    """[m,n] as [m,ceil(n/128),128] float32, with zeros at the end."""
    padded = x.new_zeros(x.shape[0], align(x.shape[1], 128), dtype=torch.float32)
    padded[:, :x.shape[1]] = x.float()
    return padded.view(x.shape[0], -1, 128)


def per_token_cast_to_fp8(x):
    """(fp8 [m,n], float32 scales [m,ceil(n/128)]), per block of 128."""
    blocks = _blocks(x)
    largest = blocks.abs().amax(2).clamp(min=1e-4)
    scaled = (blocks * (448.0 / largest)[:, :, None]).to(torch.float8_e4m3fn)
    return scaled.view(x.shape[0], -1)[:, :x.shape[1]].contiguous(), largest / 448.0


def per_token_cast_back(x_fp8, x_scales):
    """The inverse, as bfloat16; x_scales float32, or exponents packed four per int32."""
    if x_fp8.numel() == 0:
        return x_fp8.to(torch.bfloat16)
    if x_scales.dtype == torch.int:
        exponents = x_scales.clone(memory_format=torch.contiguous_format).view(torch.uint8).view(x_fp8.shape[0], -1).int() << 23
        x_scales = exponents.view(torch.float)[:, :ceil_div(x_fp8.shape[1], 128)]
    blocks = _blocks(x_fp8.float()) * x_scales.reshape(x_fp8.shape[0], -1, 1)
    return blocks.view(x_fp8.shape[0], -1)[:, :x_fp8.shape[1]].to(torch.bfloat16).contiguous()


def inplace_unique(x, num_slots: int) -> None:
    """Each row of x [m,n]: its different values >= 0, descending, then -1."""
    counts = torch.zeros(x.shape[0], num_slots + 1, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, torch.where(x < 0, num_slots, x).long(), torch.ones_like(x, dtype=torch.int64))
    values = torch.where(counts[:, :num_slots] > 0, torch.arange(num_slots, device=x.device), -1).sort(1, descending=True).values
    width = min(num_slots, x.shape[1])
    x.fill_(-1)
    x[:, :width] = values[:, :width]


def create_grouped_scores(scores, group_idx, num_groups: int):
    """scores [T,E] with zeros outside the groups of group_idx [T,g]."""
    kept = torch.zeros(scores.shape[0], num_groups, dtype=torch.bool, device=scores.device).scatter_(1, group_idx, True)
    return scores * kept.repeat_interleave(scores.shape[1] // num_groups, 1)
