//! Buffers of a Vulkan device, and what the device does with them.
//!
//! `unsafe` is here for calling into the driver; every handle is this file's own and destroyed once.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use ash::vk;

use super::{DMA_BUF, Device, MemoryChoice, RUNTIME, UNSUPPORTED, USAGE, export, refused};
use crate::dmabuf::DmaBuf;
use crate::error::ExporterError;
use crate::exporter::whole_pages;
use crate::umem::{check_range, page_size};
use crate::{Error, Result};

/// Longest that a command may take: a processor fills gigabytes in that.
const LIMIT_NS: u64 = 60_000_000_000;

/// A buffer of a Vulkan device, and its memory. Dropping it destroys both; dma-bufs of it live on.
pub struct VulkanBuffer {
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    /// Of the buffer.
    size: u64,
    /// The type of memory that was chosen.
    flags: vk::MemoryPropertyFlags,
    // Its device outlives the two.
    device: Arc<Device>,
}

impl std::fmt::Debug for VulkanBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VulkanBuffer").field("size", &self.size).field("device", &self.device).finish()
    }
}

impl VulkanBuffer {
    pub(super) fn exportable(device: &Arc<Device>, size: u64, choice: MemoryChoice) -> Result<Self> {
        let size = whole_pages(size, page_size())?;
        let mut new = Self::unbound(device, size)?;
        let needed = new.requirements();
        let wanted = match choice {
            MemoryChoice::Device => vk::MemoryPropertyFlags::DEVICE_LOCAL,
            MemoryChoice::HostVisible => vk::MemoryPropertyFlags::HOST_VISIBLE,
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
        Ok(new)
    }

    pub(super) fn imported(device: &Arc<Device>, dmabuf: &DmaBuf) -> Result<Self> {
        let unsupported =
            || Error::from(ExporterError::NotExportable { runtime: RUNTIME, remedy: UNSUPPORTED });
        if !device.importable {
            return Err(unsupported());
        }
        let mut new = Self::unbound(device, dmabuf.size())?;
        let needed = new.requirements();
        let fd: OwnedFd = dmabuf.try_clone()?.into();
        let mut possible = vk::MemoryFdPropertiesKHR::default();
        // SAFETY: the descriptor is open; drivers take any and say which memory types go with it.
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
        // It became the driver's when the import succeeded.
        let _ = fd.into_raw_fd();
        Ok(new)
    }

    /// A buffer that memory is to be bound to.
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
        // SAFETY: ours and alive.
        unsafe { self.device.device.get_buffer_memory_requirements(self.buffer) }
    }

    fn allocate(&mut self, info: &vk::MemoryAllocateInfo<'_>, size: u64) -> Result<()> {
        // SAFETY: the structs are ash's own and what they name is alive.
        self.memory = unsafe { self.device.device.allocate_memory(info, None) }
            .map_err(|code| self.device.refused("vkAllocateMemory", code, size))?;
        // SAFETY: both are ours, the memory was chosen by the buffer's requirements, and is bound once.
        unsafe { self.device.device.bind_buffer_memory(self.buffer, self.memory, 0) }
            .map_err(|code| refused("vkBindBufferMemory", code))
    }

    /// Size in bytes, of whole pages.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether its memory is the device's own.
    pub fn is_device_local(&self) -> bool {
        self.flags.contains(vk::MemoryPropertyFlags::DEVICE_LOCAL)
    }

    /// The buffer's dma-buf. Each call gives a descriptor of its own.
    ///
    /// # Errors
    /// [`ExporterError::OutOfDescriptors`], [`ExporterError::RuntimeCall`];
    /// [`ExporterError::NotExportable`] for a buffer that was imported.
    #[doc(alias = "vkGetMemoryFdKHR")]
    pub fn export(&self) -> Result<DmaBuf> {
        let _span = crate::observe::exporting(|| RUNTIME.into(), self.size);
        // SAFETY: the memory is ours and alive.
        unsafe { export(&self.device.fd, self.memory) }
    }

    /// Has the device set each 32-bit word of `length` bytes from `offset` on, and waits for it. Both are
    /// multiples of 4; what is beyond a multiple is left out.
    ///
    /// # Errors
    /// [`Error::ZeroLength`], [`Error::OutOfRange`], [`ExporterError::RuntimeCall`].
    #[doc(alias = "vkCmdFillBuffer")]
    pub fn fill(&self, offset: u64, length: u64, word: u32) -> Result<()> {
        self.fill_each([(offset, length, word)])
    }

    /// The same for several ranges, which the device works on together.
    ///
    /// # Errors
    /// As [`fill`](Self::fill), before anything is filled.
    pub fn fill_each(&self, ranges: impl IntoIterator<Item = (u64, u64, u32)>) -> Result<()> {
        let ranges: Vec<_> = ranges.into_iter().collect();
        for (offset, length, _) in &ranges {
            check_range(*offset, *length, self.size)?;
        }
        self.device.run(|commands| {
            for (offset, length, word) in &ranges {
                let (offset, length) = (offset - offset % 4, length - length % 4);
                // SAFETY: the commands are being recorded; the range is inside the buffer.
                unsafe { self.device.device.cmd_fill_buffer(commands, self.buffer, offset, length, *word) };
            }
        })
    }

    /// Has the device copy all of another buffer of the same device into the beginning of this one.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]: this one is smaller. [`ExporterError::RuntimeCall`].
    #[doc(alias = "vkCmdCopyBuffer")]
    pub fn copy_from(&self, source: &Self) -> Result<()> {
        check_range(0, source.size, self.size)?;
        let region = [vk::BufferCopy::default().size(source.size)];
        // SAFETY: the commands are being recorded; both buffers are alive and of one device, which holds
        // for all buffers made by one `Vulkan` or its clones, and the range is inside both.
        self.device.run(|commands| unsafe {
            self.device.device.cmd_copy_buffer(commands, source.buffer, self.buffer, &region);
        })
    }
}

impl Drop for VulkanBuffer {
    fn drop(&mut self) {
        // SAFETY: ours, once; commands with the buffer waited for their end. Null memory is ignored.
        unsafe {
            self.device.device.destroy_buffer(self.buffer, None);
            self.device.device.free_memory(self.memory, None);
        }
    }
}

impl Device {
    /// A memory type out of those in `bits`, with the flags wanted if there is one.
    fn memory_type(
        &self,
        bits: u32,
        wanted: vk::MemoryPropertyFlags,
    ) -> Result<(u32, vk::MemoryPropertyFlags)> {
        let types = self.memory.memory_types_as_slice();
        let possible = || types.iter().zip(0_u32..).filter(|(_, index)| bits & (1 << index) != 0);
        let best = possible().find(|(kind, _)| kind.property_flags.contains(wanted));
        let chosen = best.or_else(|| possible().next());
        let none = ExporterError::NotExportable { runtime: RUNTIME, remedy: UNSUPPORTED };
        chosen.map(|(kind, index)| (index, kind.property_flags)).ok_or_else(|| none.into())
    }

    /// Records commands, and waits until the device has run them and host and others see what it wrote.
    fn run(&self, record: impl FnOnce(vk::CommandBuffer)) -> Result<()> {
        let locked = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let (queue, pool) = *locked;
        let device = &self.device;
        let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
        // SAFETY: the pool is ours, and locked.
        let buffers = unsafe { device.allocate_command_buffers(&info) }
            .map_err(|code| refused("vkAllocateCommandBuffers", code))?;
        let done = self.submit(queue, buffers[0], record);
        // SAFETY: allocated above; the device has run it, or did not get it.
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
        // SAFETY: the commands are ours, begun once and ended before they are submitted.
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
        // SAFETY: commands and fence are ours and outlive the wait; should it end without them being done,
        // the queue is waited for as well before they are destroyed.
        unsafe {
            let done = device
                .queue_submit(queue, &work, fence)
                .map_err(|code| refused("vkQueueSubmit", code))
                .and_then(|()| {
                    let waited = device.wait_for_fences(&[fence], true, LIMIT_NS);
                    waited.map_err(|code| refused("vkWaitForFences", code))
                });
            if done.is_err() {
                let _ = device.queue_wait_idle(queue);
            }
            device.destroy_fence(fence, None);
            done
        }
    }

    fn refused(&self, call: &'static str, code: vk::Result, size: u64) -> Error {
        let too_large =
            matches!(code, vk::Result::ERROR_OUT_OF_DEVICE_MEMORY | vk::Result::ERROR_OUT_OF_HOST_MEMORY);
        match refused(call, code) {
            Error::Exporters(ExporterError::RuntimeCall { .. }) if too_large => {
                ExporterError::TooLarge { runtime: RUNTIME, size }.into()
            }
            error => error,
        }
    }
}
