//! What does not depend on whether the device imports dma-bufs: buffers, exporters, checks before the
//! system call, verbs objects.

mod dmabuf;
mod exporters;
mod fences;
mod foreign;
mod pagemap;
mod registration_checks;
mod verbs;
