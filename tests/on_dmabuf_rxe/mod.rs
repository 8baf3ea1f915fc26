//! Tests for a device that imports dma-bufs.

mod cache;
mod cache_model;
mod data;
mod device_view;
mod events;
mod fabric;
pub mod fork;
mod fork_objects;
mod handles;
mod host_memory;
mod lifetime;
mod namespaces;
mod newer;
mod observe;
mod operations;
mod posting;
mod protection;
mod queue_pairs;
mod runtimes;
mod self_check;
mod sets;
mod support;
pub mod transfer;
mod v4l2;
mod vulkan;
