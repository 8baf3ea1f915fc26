//! Integration tests. They need root and an RDMA device, so `cargo xtask test` runs them in a guest,
//! on the distribution's soft-RoCE, on one that imports dma-bufs, and on odd kernels; each folder says
//! where its tests belong.

mod common;
mod long;
mod on_any_rxe;
mod on_dmabuf_rxe;
mod on_gpu;
mod on_iommu;
mod on_linux_6_12;
mod on_linux_7;
mod on_pci;
mod on_stock_rxe;
mod on_swiotlb;
