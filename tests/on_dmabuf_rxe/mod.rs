//! A device that imports dma-bufs.

mod data;
mod lifetime;
mod protection;
mod support;
