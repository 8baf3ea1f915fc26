//! Buffers of a Vulkan device, and the device's commands on them.
//!
//! `unsafe` is here for calling into the driver. This file makes every handle and destroys it once.

use std::ops::{Range, RangeBounds};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use ash::vk;
use dma_sg::{check_range, page_size, resolve_range};

use super::{DMA_BUF, Device, RUNTIME, UNSUPPORTED, USAGE, export, refused};
use crate::dmabuf::DmaBuf;
use crate::exporter::{Error, PointerError, Result, whole_pages, whole_words};

/// Timeout of one submission, in which even a CPU device fills gigabytes.
const TIMEOUT_NS: u64 = 60_000_000_000;

/// A buffer of a Vulkan device, and its memory. Dropping it destroys both; its dma-bufs stay valid.
pub struct VulkanBuffer {
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    /// Size of the buffer in bytes.
    size: u64,
    /// Flags of the memory's type.
    flags: vk::MemoryPropertyFlags,
    // Keeps the device alive until both are destroyed.
    device: Arc<Device>,
}

impl std::fmt::Debug for VulkanBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VulkanBuffer").field("size", &self.size).field("device", &self.device).finish()
    }
}

impl VulkanBuffer {
    pub(super) fn exportable(device: &Arc<Device>, size: u64, host_visible: bool) -> Result<Self> {
        let size = whole_pages(size, page_size())?;
        let mut new = Self::unbound(device, size)?;
        let needed = new.requirements();
        let wanted = match host_visible {
            false => vk::MemoryPropertyFlags::DEVICE_LOCAL,
            true => vk::MemoryPropertyFlags::HOST_VISIBLE,
        };
        let (index, flags) = device.memory_type(needed.memory_type_bits, wanted)?;
        new.flags = flags;
        let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(DMA_BUF);
        let mut dedicated = vk::MemoryDedicatedAllocateInfo::default().buffer(new.buffer);
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(needed.size)
            .memory_type_index(index)
            .push_next(&mut export)
            .push_next(&mut dedicated);
        new.allocate(&info, size)?;
        new.bind()?;
        Ok(new)
    }

    pub(super) fn imported(device: &Arc<Device>, dmabuf: &DmaBuf) -> Result<Self> {
        let unsupported = || PointerError::NotExportable { runtime: RUNTIME, remedy: UNSUPPORTED };
        if !device.importable {
            return Err(unsupported().into());
        }
        let mut new = Self::unbound(device, dmabuf.size())?;
        let needed = new.requirements();
        let fd: OwnedFd = dmabuf.try_clone()?.into();
        let mut possible = vk::MemoryFdPropertiesKHR::default();
        // SAFETY: the descriptor is open. Drivers accept any and report the memory types that fit it.
        unsafe { device.fd.get_memory_fd_properties(DMA_BUF, fd.as_raw_fd(), &mut possible) }
            .map_err(|code| refused("vkGetMemoryFdPropertiesKHR", code))?;
        let bits = needed.memory_type_bits & possible.memory_type_bits;
        let (index, flags) =
            device.memory_type(bits, vk::MemoryPropertyFlags::DEVICE_LOCAL).map_err(|_| unsupported())?;
        new.flags = flags;
        let mut import = vk::ImportMemoryFdInfoKHR::default().handle_type(DMA_BUF).fd(fd.as_raw_fd());
        let mut dedicated = vk::MemoryDedicatedAllocateInfo::default().buffer(new.buffer);
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(needed.size.max(dmabuf.size()))
            .memory_type_index(index)
            .push_next(&mut import)
            .push_next(&mut dedicated);
        new.allocate(&info, dmabuf.size())?;
        // The driver owns the descriptor after a successful import, whatever fails later.
        let _ = fd.into_raw_fd();
        new.bind()?;
        Ok(new)
    }

    /// A buffer that no memory is bound to yet.
    fn unbound(device: &Arc<Device>, size: u64) -> Result<Self> {
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(DMA_BUF);
        let info = vk::BufferCreateInfo::default().size(size).usage(USAGE).push_next(&mut external);
        // SAFETY: the device is alive; the structs are ash's own.
        let buffer = unsafe { device.device.create_buffer(&info, None) }
            .map_err(|code| device.refused("vkCreateBuffer", code, size))?;
        let (memory, flags) = (vk::DeviceMemory::null(), vk::MemoryPropertyFlags::empty());
        Ok(Self { buffer, memory, size, flags, device: Arc::clone(device) })
    }

    fn requirements(&self) -> vk::MemoryRequirements {
        // SAFETY: this made the buffer, which is alive.
        unsafe { self.device.device.get_buffer_memory_requirements(self.buffer) }
    }

    fn allocate(&mut self, info: &vk::MemoryAllocateInfo<'_>, size: u64) -> Result<()> {
        // SAFETY: the structs are ash's own, and the handles in them are alive.
        self.memory = unsafe { self.device.device.allocate_memory(info, None) }
            .map_err(|code| self.device.refused("vkAllocateMemory", code, size))?;
        Ok(())
    }

    fn bind(&self) -> Result<()> {
        // SAFETY: this made both. The memory fits the buffer's requirements and is bound once.
        unsafe { self.device.device.bind_buffer_memory(self.buffer, self.memory, 0) }
            .map_err(|code| refused("vkBindBufferMemory", code).into())
    }

    /// Size in bytes, a multiple of the page size.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the memory is local to the device.
    pub fn is_device_local(&self) -> bool {
        self.flags.contains(vk::MemoryPropertyFlags::DEVICE_LOCAL)
    }

    /// Exports the buffer's memory as a dma-buf. Each call makes a new descriptor.
    ///
    /// # Errors
    /// - [`PointerError::NotExportable`]: the buffer was imported.
    /// - [`PointerError::OutOfDescriptors`], [`PointerError::RuntimeCall`].
    #[doc(alias = "vkGetMemoryFdKHR")]
    pub fn export(&self) -> Result<DmaBuf> {
        let _span = crate::observe::exporting(|| RUNTIME.into(), self.size);
        // SAFETY: this allocated the memory, which is alive.
        let dmabuf = unsafe { export(&self.device.fd, self.memory) }?;
        Ok(dmabuf.with_device(self.device.address))
    }

    /// Has the device set every aligned 32-bit word inside the range, and waits for it.
    ///
    /// # Errors
    /// - [`Error::Range`]: the range is empty, not inside the buffer, or contains no such word.
    /// - [`PointerError::RuntimeCall`].
    #[doc(alias = "vkCmdFillBuffer")]
    pub fn fill(&self, range: impl RangeBounds<u64>, word: u32) -> Result<()> {
        self.fill_each([(range, word)])
    }

    /// As [`fill`](Self::fill) for several ranges, each with its word, in one submission.
    ///
    /// # Errors
    /// As [`fill`](Self::fill). If a range is refused, nothing is filled.
    pub fn fill_each<R: RangeBounds<u64>>(&self, fills: impl IntoIterator<Item = (R, u32)>) -> Result<()> {
        let fills = fills.into_iter().map(|(range, word)| {
            let range = resolve_range(range, self.size)?;
            Ok((whole_words(range)?, word))
        });
        let fills: Vec<(Range<u64>, u32)> = fills.collect::<Result<_>>()?;
        self.device.run(|commands| {
            for (range, word) in &fills {
                let (offset, length) = (range.start, range.end - range.start);
                // SAFETY: the commands are being recorded, and the range is inside the buffer.
                unsafe { self.device.device.cmd_fill_buffer(commands, self.buffer, offset, length, *word) };
            }
        })
    }

    /// Has the device copy the whole of another buffer of the same device to the start of this one.
    ///
    /// # Errors
    /// - [`PointerError::CopySource`]: `source` belongs to another device, or is this buffer.
    /// - [`Error::Range`]: this buffer is smaller.
    /// - [`PointerError::RuntimeCall`].
    #[doc(alias = "vkCmdCopyBuffer")]
    pub fn copy_from(&self, source: &Self) -> Result<()> {
        if !Arc::ptr_eq(&self.device, &source.device) {
            let reason = "the source is a buffer of another device; export it and import it into this one";
            return Err(PointerError::CopySource { reason }.into());
        }
        if std::ptr::eq(self, source) {
            let reason = "the source is this buffer itself; copy from another one";
            return Err(PointerError::CopySource { reason }.into());
        }
        check_range(0, source.size, self.size)?;
        let region = [vk::BufferCopy::default().size(source.size)];
        // SAFETY: the commands are being recorded, both buffers are alive and of this device, and the range is
        // inside both.
        self.device.run(|commands| unsafe {
            self.device.device.cmd_copy_buffer(commands, source.buffer, self.buffer, &region);
        })
    }
}

impl Drop for VulkanBuffer {
    fn drop(&mut self) {
        if !self.device.creator.is_current() {
            return;
        }
        // SAFETY: this made both and destroys them once, after all commands on them have ended. Null memory is
        // permitted.
        unsafe {
            self.device.device.destroy_buffer(self.buffer, None);
            self.device.device.free_memory(self.memory, None);
        }
    }
}

impl Device {
    /// Chooses a memory type of those in `bits`: one with the wanted flags, otherwise the first.
    fn memory_type(
        &self,
        bits: u32,
        wanted: vk::MemoryPropertyFlags,
    ) -> Result<(u32, vk::MemoryPropertyFlags)> {
        let types = self.memory.memory_types_as_slice();
        let possible = || types.iter().zip(0_u32..).filter(|(_, index)| bits & (1 << index) != 0);
        let best = possible().find(|(kind, _)| kind.property_flags.contains(wanted));
        let chosen = best.or_else(|| possible().next());
        let none = PointerError::NotExportable { runtime: RUNTIME, remedy: UNSUPPORTED };
        chosen.map(|(kind, index)| (index, kind.property_flags)).ok_or_else(|| none.into())
    }

    /// Records commands, submits them, and waits until their writes are visible to the host and to others.
    fn run(&self, record: impl FnOnce(vk::CommandBuffer)) -> Result<()> {
        let locked = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let (queue, pool) = *locked;
        let device = &self.device;
        let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
        // SAFETY: this device made the pool, and the mutex is locked.
        let buffers = unsafe { device.allocate_command_buffers(&info) }
            .map_err(|code| refused("vkAllocateCommandBuffers", code))?;
        let done = self.submit(queue, buffers[0], record);
        // SAFETY: allocated above, and the device has finished with it or never got it.
        unsafe { device.free_command_buffers(pool, &buffers) };
        done
    }

    fn submit(
        &self,
        queue: vk::Queue,
        commands: vk::CommandBuffer,
        record: impl FnOnce(vk::CommandBuffer),
    ) -> Result<()> {
        let device = &self.device;
        let once = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        let barrier = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::TRANSFER_WRITE)
            .dst_access_mask(vk::AccessFlags::HOST_READ | vk::AccessFlags::MEMORY_READ)];
        // SAFETY: the command buffer is begun once here and ended before it is submitted.
        unsafe {
            device.begin_command_buffer(commands, &once).map_err(|c| refused("vkBeginCommandBuffer", c))?;
            record(commands);
            let (from, to) = (
                vk::PipelineStageFlags::TRANSFER,
                vk::PipelineStageFlags::HOST | vk::PipelineStageFlags::ALL_COMMANDS,
            );
            let flags = vk::DependencyFlags::empty();
            device.cmd_pipeline_barrier(commands, from, to, flags, &barrier, &[], &[]);
            device.end_command_buffer(commands).map_err(|c| refused("vkEndCommandBuffer", c))?;
        }
        // SAFETY: the device is alive.
        let fence = unsafe { device.create_fence(&vk::FenceCreateInfo::default(), None) }
            .map_err(|code| refused("vkCreateFence", code))?;
        let list = [commands];
        let work = [vk::SubmitInfo::default().command_buffers(&list)];
        // SAFETY: commands and fence outlive the wait. If the wait fails, they live until the queue is idle.
        unsafe {
            let done = device
                .queue_submit(queue, &work, fence)
                .map_err(|code| refused("vkQueueSubmit", code))
                .and_then(|()| {
                    let waited = device.wait_for_fences(&[fence], true, TIMEOUT_NS);
                    waited.map_err(|code| refused("vkWaitForFences", code))
                });
            if done.is_err() {
                let _ = device.queue_wait_idle(queue);
            }
            device.destroy_fence(fence, None);
            Ok(done?)
        }
    }

    fn refused(&self, call: &'static str, code: vk::Result, size: u64) -> Error {
        let out_of_memory =
            matches!(code, vk::Result::ERROR_OUT_OF_DEVICE_MEMORY | vk::Result::ERROR_OUT_OF_HOST_MEMORY);
        match refused(call, code) {
            PointerError::RuntimeCall { .. } if out_of_memory => Error::OutOfMemory {
                exporter: self.exporter_name(),
                requested: size,
                available: None,
                limit: None,
            },
            error => error.into(),
        }
    }
}
