//! A device that imports dma-bufs.

mod data;
mod device_view;
mod lifetime;
mod protection;
mod support;
mod transfer;
