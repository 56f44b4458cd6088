"""Tuning knobs of DeepEP, which this exchange does not need, and sizes of buffers, which it allocates by itself."""
from dataclasses import dataclass


@dataclass
class Config:
    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """What a caller may pass as num_nvl_bytes; memory is allocated by need."""
        return num_ranks * self.num_max_nvl_chunked_recv_tokens * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0 within a link domain of 8 ranks."""
        return 0 if num_ranks <= 8 else num_ranks // 8 * self.num_max_rdma_chunked_recv_tokens * hidden_bytes
