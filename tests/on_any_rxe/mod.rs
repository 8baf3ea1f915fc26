//! Tests for any device, whether or not it imports dma-bufs: buffers, exporters, checks before the system
//! call, verbs objects.

mod absence;
mod dmabuf;
mod exporters;
mod fences;
mod foreign;
mod gids;
mod host_files;
mod host_memory;
mod memory_limits;
mod pagemap;
mod registration_checks;
mod verbs;
