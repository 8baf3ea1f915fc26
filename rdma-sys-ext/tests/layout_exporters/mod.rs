//! The hand-written layouts of the exporter modules; `exporters.c` has the C side.

use super::{Facts, size_of_field};
use rdma_sys_ext::{hsa, level_zero, v4l2};
use std::mem::offset_of;

pub fn v4l2(facts: &mut Facts) {
    values!(facts:
        "V4L2_BUF_TYPE_VIDEO_CAPTURE" = v4l2::TYPE_CAPTURE,
        "V4L2_BUF_TYPE_VIDEO_CAPTURE_MPLANE" = v4l2::TYPE_CAPTURE_MPLANE,
        "V4L2_MEMORY_MMAP" = v4l2::MEMORY_MMAP,
        "V4L2_MEMORY_DMABUF" = v4l2::MEMORY_DMABUF,
        "V4L2_CAP_VIDEO_CAPTURE" = v4l2::CAP_VIDEO_CAPTURE,
        "V4L2_CAP_VIDEO_CAPTURE_MPLANE" = v4l2::CAP_VIDEO_CAPTURE_MPLANE,
        "V4L2_CAP_STREAMING" = v4l2::CAP_STREAMING,
        "V4L2_CAP_DEVICE_CAPS" = v4l2::CAP_DEVICE_CAPS,
        "V4L2_BUF_FLAG_ERROR" = v4l2::BUF_FLAG_ERROR,
        "VIDIOC_QUERYCAP" = v4l2::IOCTL_QUERYCAP,
        "VIDIOC_G_FMT" = v4l2::IOCTL_G_FMT,
        "VIDIOC_REQBUFS" = v4l2::IOCTL_REQBUFS,
        "VIDIOC_QBUF" = v4l2::IOCTL_QBUF,
        "VIDIOC_EXPBUF" = v4l2::IOCTL_EXPBUF,
        "VIDIOC_DQBUF" = v4l2::IOCTL_DQBUF,
        "VIDIOC_STREAMON" = v4l2::IOCTL_STREAMON,
        "VIDIOC_STREAMOFF" = v4l2::IOCTL_STREAMOFF,
        "struct v4l2_buffer" = size_of::<v4l2::Buffer>(),
        "struct v4l2_format" = size_of::<v4l2::Format>(),
        "v4l2_format.fmt" = offset_of!(v4l2::Format, pix),
        "v4l2_format.fmt.pix_mp" = offset_of!(v4l2::FormatMplane, pix_mp),
        "struct v4l2_format, multi-planar" = size_of::<v4l2::FormatMplane>(),
        "struct v4l2_pix_format_mplane" = size_of::<v4l2::PixFormatMplane>(),
    );
    whole!(facts: "v4l2_capability" = v4l2::Capability { driver, card, bus_info, version, capabilities, device_caps, reserved });
    whole!(facts: "v4l2_requestbuffers" = v4l2::RequestBuffers { count, buf_type, memory, capabilities, flags, reserved });
    fields!(facts: "v4l2_buffer" = v4l2::Buffer { index, buf_type, bytesused, flags, field, timestamp, timecode, sequence, memory, m, length, reserved2, request_fd });
    whole!(facts: "v4l2_exportbuffer" = v4l2::ExportBuffer { buf_type, index, plane, flags, fd, reserved });
    whole!(facts: "v4l2_plane" = v4l2::Plane { bytesused, length, m, data_offset, reserved });
    whole!(facts: "v4l2_plane_pix_format" = v4l2::PlanePixFormat { sizeimage, bytesperline, reserved });
    fields!(facts: "v4l2_pix_format_mplane" = v4l2::PixFormatMplane { width, height, pixelformat, field, colorspace, plane_fmt, num_planes });
    fields!(facts: "v4l2_pix_format" = v4l2::PixFormat { width, height, pixelformat, field, bytesperline, sizeimage });
}

pub fn hsa(facts: &mut Facts) {
    values!(facts:
        "HSA_STATUS_SUCCESS" = hsa::SUCCESS,
        "HSA_STATUS_ERROR_INVALID_ARGUMENT" = hsa::ERROR_INVALID_ARGUMENT,
        "HSA_STATUS_ERROR_INVALID_ALLOCATION" = hsa::ERROR_INVALID_ALLOCATION,
        "HSA_STATUS_ERROR_INVALID_AGENT" = hsa::ERROR_INVALID_AGENT,
        "HSA_STATUS_ERROR_OUT_OF_RESOURCES" = hsa::ERROR_OUT_OF_RESOURCES,
        "HSA_STATUS_ERROR_NOT_INITIALIZED" = hsa::ERROR_NOT_INITIALIZED,
        "HSA_EXT_POINTER_TYPE_UNKNOWN" = hsa::POINTER_TYPE_UNKNOWN,
        "HSA_EXT_POINTER_TYPE_HSA" = hsa::POINTER_TYPE_HSA,
        "HSA_EXT_POINTER_TYPE_LOCKED" = hsa::POINTER_TYPE_LOCKED,
        "HSA_AGENT_INFO_DEVICE" = hsa::AGENT_INFO_DEVICE,
        "HSA_AMD_AGENT_INFO_BDFID" = hsa::AGENT_INFO_BDFID,
        "HSA_AMD_AGENT_INFO_DOMAIN" = hsa::AGENT_INFO_DOMAIN,
        "HSA_DEVICE_TYPE_CPU" = hsa::DEVICE_TYPE_CPU,
        "HSA_DEVICE_TYPE_GPU" = hsa::DEVICE_TYPE_GPU,
        "HSA_AMD_MEMORY_POOL_INFO_SEGMENT" = hsa::POOL_INFO_SEGMENT,
        "HSA_AMD_MEMORY_POOL_INFO_GLOBAL_FLAGS" = hsa::POOL_INFO_GLOBAL_FLAGS,
        "HSA_AMD_MEMORY_POOL_INFO_SIZE" = hsa::POOL_INFO_SIZE,
        "HSA_AMD_MEMORY_POOL_INFO_RUNTIME_ALLOC_ALLOWED" = hsa::POOL_INFO_ALLOC_ALLOWED,
        "HSA_AMD_SEGMENT_GLOBAL" = hsa::SEGMENT_GLOBAL,
        "HSA_AMD_MEMORY_POOL_GLOBAL_FLAG_COARSE_GRAINED" = hsa::POOL_FLAG_COARSE_GRAINED,
    );
    whole!(facts: "hsa_agent_t" = hsa::Agent { handle });
    whole!(facts: "hsa_amd_memory_pool_t" = hsa::Pool { handle });
    whole!(facts: "hsa_amd_pointer_info_t" = hsa::PointerInfo { size, pointer_type, agent_base_address, host_base_address, size_in_bytes, user_data, agent_owner, global_flags });
}

pub fn level_zero(facts: &mut Facts) {
    values!(facts:
        "ZE_RESULT_SUCCESS" = level_zero::SUCCESS,
        "ZE_RESULT_ERROR_OUT_OF_HOST_MEMORY" = level_zero::ERROR_OUT_OF_HOST_MEMORY,
        "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY" = level_zero::ERROR_OUT_OF_DEVICE_MEMORY,
        "ZE_RESULT_ERROR_UNINITIALIZED" = level_zero::ERROR_UNINITIALIZED,
        "ZE_RESULT_ERROR_UNSUPPORTED_FEATURE" = level_zero::ERROR_UNSUPPORTED_FEATURE,
        "ZE_RESULT_ERROR_INVALID_ARGUMENT" = level_zero::ERROR_INVALID_ARGUMENT,
        "ZE_RESULT_ERROR_UNSUPPORTED_SIZE" = level_zero::ERROR_UNSUPPORTED_SIZE,
        "ZE_RESULT_ERROR_UNSUPPORTED_ENUMERATION" = level_zero::ERROR_UNSUPPORTED_ENUMERATION,
        "ZE_STRUCTURE_TYPE_CONTEXT_DESC" = level_zero::STYPE_CONTEXT_DESC,
        "ZE_STRUCTURE_TYPE_COMMAND_QUEUE_DESC" = level_zero::STYPE_QUEUE_DESC,
        "ZE_STRUCTURE_TYPE_DEVICE_MEM_ALLOC_DESC" = level_zero::STYPE_ALLOC_DESC,
        "ZE_STRUCTURE_TYPE_MEMORY_ALLOCATION_PROPERTIES" = level_zero::STYPE_ALLOC_PROPERTIES,
        "ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_EXPORT_DESC" = level_zero::STYPE_EXPORT_DESC,
        "ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_EXPORT_FD" = level_zero::STYPE_EXPORT_FD,
        "ZE_STRUCTURE_TYPE_PCI_EXT_PROPERTIES" = level_zero::STYPE_PCI_PROPERTIES,
        "ZE_EXTERNAL_MEMORY_TYPE_FLAG_DMA_BUF" = level_zero::EXTERNAL_DMA_BUF,
        "ZE_MEMORY_TYPE_UNKNOWN" = level_zero::MEMORY_UNKNOWN,
        "ZE_MEMORY_TYPE_HOST" = level_zero::MEMORY_HOST,
        "ZE_MEMORY_TYPE_DEVICE" = level_zero::MEMORY_DEVICE,
        "ZE_MEMORY_TYPE_SHARED" = level_zero::MEMORY_SHARED,
        "ZE_COMMAND_QUEUE_MODE_SYNCHRONOUS" = level_zero::QUEUE_SYNCHRONOUS,
    );
    whole!(facts: "ze_context_desc_t" = level_zero::ContextDesc { stype, next, flags });
    whole!(facts: "ze_command_queue_desc_t" = level_zero::QueueDesc { stype, next, ordinal, index, flags, mode, priority });
    whole!(facts: "ze_device_mem_alloc_desc_t" = level_zero::AllocDesc { stype, next, flags, ordinal });
    whole!(facts: "ze_external_memory_export_desc_t" = level_zero::ExportDesc { stype, next, flags });
    whole!(facts: "ze_memory_allocation_properties_t" = level_zero::AllocProperties { stype, next, memory_type, id, page_size });
    whole!(facts: "ze_external_memory_export_fd_t" = level_zero::ExportFd { stype, next, flags, fd });
    whole!(facts: "ze_pci_ext_properties_t" = level_zero::PciProperties { stype, next, address, max_speed });
    whole!(facts: "ze_pci_address_ext_t" = level_zero::PciPlace { domain, bus, device, function });
    whole!(facts: "ze_pci_speed_ext_t" = level_zero::PciSpeed { generation, width, max_bandwidth });
}
