//! The distribution's soft-RoCE, which cannot import dma-bufs: the refusals, and HostMapping.

mod doctor;
mod host_mapping;
mod refusals;
mod sets;
