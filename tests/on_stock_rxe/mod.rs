//! The distribution's own soft-RoCE, which cannot import a dma-buf: every refusal says so, and
//! HostMapping serves those who own the pages.

mod host_mapping;
mod refusals;
mod sets;
