//! The integration tests. They need root and an RDMA device, so `cargo xtask test` runs them in guests: with
//! the distribution's soft-RoCE, with one that imports dma-bufs, and with other kernels. A test's folder decides
//! in which guest it runs.

mod common;
mod doctor;
mod long;
mod on_any_rxe;
mod on_debian_provider;
mod on_debug_kernel;
mod on_dmabuf_rxe;
mod on_gpu;
mod on_iommu;
mod on_linux_6_12;
mod on_linux_7;
mod on_pci;
mod on_profiles;
mod on_siw;
mod on_stock_rxe;
mod on_swiotlb;
