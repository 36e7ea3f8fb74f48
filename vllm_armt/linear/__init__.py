"""Linear layers and norms of all L decoder layers in one, so that the rows of several layers are one call.

A linear layer is a weight that knows its parts and tensor-parallel cuts, and a GEMM backend, chosen once:

| backend | where | rows of one layer | of several, equally many | unequally many |
|---|---|---|---|---|
| `onednn` | CPUs | product with the packed weight | loop over layers | loop over layers |
| `grouped` | CUDA from compute capability 9.0, bfloat16 | `F.linear` | `torch.bmm` | `F.grouped_mm` |
| `batched` | everywhere | `F.linear` | `torch.bmm` | `torch.bmm` for each run of equally many |
"""
