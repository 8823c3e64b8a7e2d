"""SGLang's own host pools, small and on the CPU, with device buffers that nobody reads."""

import torch
from sglang.srt.mem_cache.device_pool_info import (
    KVBufferLayout,
    KVBuffers,
    MambaStateBufferInfo,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

PAGE_SIZE, LAYERS, HEADS, HEAD_DIM, TOKENS = 16, 3, 2, 32, 16 * 24
LATENT, ROPE = 64, 16
CPU = torch.device("cpu")
BUDGET = 1 << 30
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


def mha_pool(layout="page_first", dtype=torch.bfloat16, page_size=PAGE_SIZE, heads=HEADS):
    def buffers():
        return tuple(torch.zeros(TOKENS, heads, HEAD_DIM, dtype=dtype) for _ in range(LAYERS))

    keys, values = buffers(), buffers()
    pointers = torch.zeros(LAYERS, dtype=torch.uint64)
    device = KVBuffers(k=keys, v=values, k_data_ptrs=pointers, v_data_ptrs=pointers, layout=KVBufferLayout.NHD)
    info = MHABufferInfo(
        buffers=device,
        page_size=page_size,
        head_num=heads,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        dtype=dtype,
        device=CPU,
    )
    with host_memory_budget_scope(BUDGET):
        return MHATokenToKVPoolHost(
            info,
            1.0,
            0,
            page_size,
            layout,
            pin_memory=False,
            device_capacity_tokens=TOKENS,
            start_layer=0,
            end_layer=LAYERS,
        )


def mla_pool(layout="page_first"):
    rows = tuple(torch.zeros(TOKENS, 1, LATENT + ROPE, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=torch.zeros(LAYERS, dtype=torch.uint64),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE_SIZE,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        kv_cache_dim=LATENT + ROPE,
        dtype=torch.bfloat16,
        device=CPU,
    )
    with host_memory_budget_scope(BUDGET):
        return MLATokenToKVPoolHost(
            info,
            1.0,
            0,
            PAGE_SIZE,
            layout,
            pin_memory=False,
            device_capacity_tokens=TOKENS,
            start_layer=0,
            end_layer=LAYERS,
            target_layer_num=LAYERS,
        )


def mamba_pool(layout="page_first", states=24):
    info = MambaStateBufferInfo(
        conv=[torch.zeros(LAYERS, states, 48, 3, dtype=torch.bfloat16)],
        temporal=torch.zeros(LAYERS, states, 4, 16, 48, dtype=torch.float32),
    )
    with host_memory_budget_scope(BUDGET):
        return MambaPoolHost(info, 1.0, 0, device_capacity=states, pin_memory=False, layout=layout)


def fill(pool, seed):
    """Write random bytes to every page of a pool; return them, as flat pages by number."""
    generator = torch.Generator().manual_seed(seed)
    for page in range(num_pages(pool)):
        flat = pool.get_dummy_flat_data_page()
        raw = torch.randint(0, 256, (flat.numel() * flat.element_size(),), dtype=torch.uint8, generator=generator)
        pool.set_from_flat_data_page(page * pool.page_size, raw.view(flat.dtype))
    return pages_of(pool)


def wipe(pool):
    for page in range(num_pages(pool)):
        pool.set_from_flat_data_page(page * pool.page_size, pool.get_dummy_flat_data_page())


def pages_of(pool):
    """Return the bytes of every page."""
    return [page_of(pool, page) for page in range(num_pages(pool))]


def page_of(pool, page):
    flat = pool.get_data_page(page * pool.page_size, flat=True)
    return flat.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def num_pages(pool):
    return 20


def indices(pool, pages):
    """Return the host indices of pages, as SGLang gives them."""
    size = pool.page_size
    return torch.cat([torch.arange(page * size, (page + 1) * size, dtype=torch.int64) for page in pages])
