/* The exporters' part of layout.c. Most machines lack the headers of ROCm and oneAPI. */
#include <linux/videodev2.h>
#if __has_include(<hsa/hsa_ext_amd.h>)
#include <hsa/hsa_ext_amd.h>
#endif
#if __has_include(<level_zero/ze_api.h>)
#include <level_zero/ze_api.h>
#endif

/* For types that C names without `struct`. */
#define TYPE_SIZE(type) NAMED("struct " #type, sizeof(type))
#define TYPE_FIELD_AS(type, field, rust)                                                           \
	do {                                                                                       \
		NAMED(#type "." #rust, offsetof(type, field));                                     \
		NAMED("sizeof " #type "." #rust, sizeof(((type *)0)->field));                      \
	} while (0)
#define TYPE_FIELD(type, field) TYPE_FIELD_AS(type, field, field)

static void exporters(void)
{
	VALUE(V4L2_BUF_TYPE_VIDEO_CAPTURE);
	VALUE(V4L2_BUF_TYPE_VIDEO_CAPTURE_MPLANE);
	VALUE(V4L2_MEMORY_MMAP);
	VALUE(V4L2_MEMORY_DMABUF);
	VALUE(V4L2_CAP_VIDEO_CAPTURE);
	VALUE(V4L2_CAP_VIDEO_CAPTURE_MPLANE);
	VALUE(V4L2_CAP_STREAMING);
	VALUE(V4L2_CAP_DEVICE_CAPS);
	VALUE(V4L2_BUF_FLAG_ERROR);
	VALUE(VIDIOC_QUERYCAP);
	VALUE(VIDIOC_G_FMT);
	VALUE(VIDIOC_REQBUFS);
	VALUE(VIDIOC_QBUF);
	VALUE(VIDIOC_EXPBUF);
	VALUE(VIDIOC_DQBUF);
	VALUE(VIDIOC_STREAMON);
	VALUE(VIDIOC_STREAMOFF);
	SIZE(v4l2_format);
	NAMED("v4l2_format.fmt", offsetof(struct v4l2_format, fmt));
	NAMED("v4l2_format.fmt.pix_mp", offsetof(struct v4l2_format, fmt.pix_mp));
	NAMED("struct v4l2_format, multi-planar", sizeof(struct v4l2_format));
	SIZE(v4l2_pix_format_mplane);
	FIELD(v4l2_pix_format_mplane, width);
	FIELD(v4l2_pix_format_mplane, height);
	FIELD(v4l2_pix_format_mplane, pixelformat);
	FIELD(v4l2_pix_format_mplane, field);
	FIELD(v4l2_pix_format_mplane, colorspace);
	FIELD(v4l2_pix_format_mplane, plane_fmt);
	FIELD(v4l2_pix_format_mplane, num_planes);
	SIZE(v4l2_plane_pix_format);
	FIELD(v4l2_plane_pix_format, sizeimage);
	FIELD(v4l2_plane_pix_format, bytesperline);
	FIELD(v4l2_plane_pix_format, reserved);
	SIZE(v4l2_plane);
	FIELD(v4l2_plane, bytesused);
	FIELD(v4l2_plane, length);
	FIELD(v4l2_plane, m);
	FIELD(v4l2_plane, data_offset);
	FIELD(v4l2_plane, reserved);
	SIZE(v4l2_capability);
	FIELD(v4l2_capability, driver);
	FIELD(v4l2_capability, card);
	FIELD(v4l2_capability, bus_info);
	FIELD(v4l2_capability, version);
	FIELD(v4l2_capability, capabilities);
	FIELD(v4l2_capability, device_caps);
	FIELD(v4l2_capability, reserved);
	SIZE(v4l2_requestbuffers);
	FIELD(v4l2_requestbuffers, count);
	FIELD_AS(v4l2_requestbuffers, type, buf_type);
	FIELD(v4l2_requestbuffers, memory);
	FIELD(v4l2_requestbuffers, capabilities);
	FIELD(v4l2_requestbuffers, flags);
	FIELD(v4l2_requestbuffers, reserved);
	SIZE(v4l2_buffer);
	FIELD(v4l2_buffer, index);
	FIELD_AS(v4l2_buffer, type, buf_type);
	FIELD(v4l2_buffer, bytesused);
	FIELD(v4l2_buffer, flags);
	FIELD(v4l2_buffer, field);
	FIELD(v4l2_buffer, timestamp);
	FIELD(v4l2_buffer, timecode);
	FIELD(v4l2_buffer, sequence);
	FIELD(v4l2_buffer, memory);
	FIELD(v4l2_buffer, m);
	FIELD(v4l2_buffer, length);
	FIELD(v4l2_buffer, reserved2);
	FIELD(v4l2_buffer, request_fd);
	SIZE(v4l2_exportbuffer);
	FIELD_AS(v4l2_exportbuffer, type, buf_type);
	FIELD(v4l2_exportbuffer, index);
	FIELD(v4l2_exportbuffer, plane);
	FIELD(v4l2_exportbuffer, flags);
	FIELD(v4l2_exportbuffer, fd);
	FIELD(v4l2_exportbuffer, reserved);
	FIELD(v4l2_pix_format, width);
	FIELD(v4l2_pix_format, height);
	FIELD(v4l2_pix_format, pixelformat);
	FIELD(v4l2_pix_format, field);
	FIELD(v4l2_pix_format, bytesperline);
	FIELD(v4l2_pix_format, sizeimage);
#ifdef HAVE_HSA
	VALUE(HSA_STATUS_SUCCESS);
	VALUE(HSA_STATUS_ERROR_INVALID_ARGUMENT);
	VALUE(HSA_STATUS_ERROR_INVALID_ALLOCATION);
	VALUE(HSA_STATUS_ERROR_INVALID_AGENT);
	VALUE(HSA_STATUS_ERROR_OUT_OF_RESOURCES);
	VALUE(HSA_STATUS_ERROR_NOT_INITIALIZED);
	VALUE(HSA_EXT_POINTER_TYPE_UNKNOWN);
	VALUE(HSA_EXT_POINTER_TYPE_HSA);
	VALUE(HSA_EXT_POINTER_TYPE_LOCKED);
	VALUE(HSA_AGENT_INFO_DEVICE);
	VALUE(HSA_AMD_AGENT_INFO_BDFID);
	VALUE(HSA_AMD_AGENT_INFO_DOMAIN);
	VALUE(HSA_DEVICE_TYPE_CPU);
	VALUE(HSA_DEVICE_TYPE_GPU);
	VALUE(HSA_AMD_MEMORY_POOL_INFO_SEGMENT);
	VALUE(HSA_AMD_MEMORY_POOL_INFO_GLOBAL_FLAGS);
	VALUE(HSA_AMD_MEMORY_POOL_INFO_SIZE);
	VALUE(HSA_AMD_MEMORY_POOL_INFO_RUNTIME_ALLOC_ALLOWED);
	VALUE(HSA_AMD_SEGMENT_GLOBAL);
	VALUE(HSA_AMD_MEMORY_POOL_GLOBAL_FLAG_COARSE_GRAINED);
	TYPE_SIZE(hsa_agent_t);
	TYPE_FIELD(hsa_agent_t, handle);
	TYPE_SIZE(hsa_amd_memory_pool_t);
	TYPE_FIELD(hsa_amd_memory_pool_t, handle);
	TYPE_SIZE(hsa_amd_pointer_info_t);
	TYPE_FIELD(hsa_amd_pointer_info_t, size);
	TYPE_FIELD_AS(hsa_amd_pointer_info_t, type, pointer_type);
	TYPE_FIELD_AS(hsa_amd_pointer_info_t, agentBaseAddress, agent_base_address);
	TYPE_FIELD_AS(hsa_amd_pointer_info_t, hostBaseAddress, host_base_address);
	TYPE_FIELD_AS(hsa_amd_pointer_info_t, sizeInBytes, size_in_bytes);
	TYPE_FIELD_AS(hsa_amd_pointer_info_t, userData, user_data);
	TYPE_FIELD_AS(hsa_amd_pointer_info_t, agentOwner, agent_owner);
	TYPE_FIELD(hsa_amd_pointer_info_t, global_flags);
#endif
#ifdef HAVE_LEVEL_ZERO
	VALUE(ZE_RESULT_SUCCESS);
	VALUE(ZE_RESULT_ERROR_OUT_OF_HOST_MEMORY);
	VALUE(ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY);
	VALUE(ZE_RESULT_ERROR_UNINITIALIZED);
	VALUE(ZE_RESULT_ERROR_UNSUPPORTED_FEATURE);
	VALUE(ZE_RESULT_ERROR_INVALID_ARGUMENT);
	VALUE(ZE_RESULT_ERROR_UNSUPPORTED_SIZE);
	VALUE(ZE_RESULT_ERROR_UNSUPPORTED_ENUMERATION);
	VALUE(ZE_STRUCTURE_TYPE_CONTEXT_DESC);
	VALUE(ZE_STRUCTURE_TYPE_COMMAND_QUEUE_DESC);
	VALUE(ZE_STRUCTURE_TYPE_DEVICE_MEM_ALLOC_DESC);
	VALUE(ZE_STRUCTURE_TYPE_MEMORY_ALLOCATION_PROPERTIES);
	VALUE(ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_EXPORT_DESC);
	VALUE(ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_EXPORT_FD);
	VALUE(ZE_STRUCTURE_TYPE_PCI_EXT_PROPERTIES);
	VALUE(ZE_EXTERNAL_MEMORY_TYPE_FLAG_DMA_BUF);
	VALUE(ZE_MEMORY_TYPE_UNKNOWN);
	VALUE(ZE_MEMORY_TYPE_HOST);
	VALUE(ZE_MEMORY_TYPE_DEVICE);
	VALUE(ZE_MEMORY_TYPE_SHARED);
	VALUE(ZE_COMMAND_QUEUE_MODE_SYNCHRONOUS);
	TYPE_SIZE(ze_context_desc_t);
	TYPE_FIELD(ze_context_desc_t, stype);
	TYPE_FIELD_AS(ze_context_desc_t, pNext, next);
	TYPE_FIELD(ze_context_desc_t, flags);
	TYPE_SIZE(ze_command_queue_desc_t);
	TYPE_FIELD(ze_command_queue_desc_t, stype);
	TYPE_FIELD_AS(ze_command_queue_desc_t, pNext, next);
	TYPE_FIELD(ze_command_queue_desc_t, ordinal);
	TYPE_FIELD(ze_command_queue_desc_t, index);
	TYPE_FIELD(ze_command_queue_desc_t, flags);
	TYPE_FIELD(ze_command_queue_desc_t, mode);
	TYPE_FIELD(ze_command_queue_desc_t, priority);
	TYPE_SIZE(ze_device_mem_alloc_desc_t);
	TYPE_FIELD(ze_device_mem_alloc_desc_t, stype);
	TYPE_FIELD_AS(ze_device_mem_alloc_desc_t, pNext, next);
	TYPE_FIELD(ze_device_mem_alloc_desc_t, flags);
	TYPE_FIELD(ze_device_mem_alloc_desc_t, ordinal);
	TYPE_SIZE(ze_external_memory_export_desc_t);
	TYPE_FIELD(ze_external_memory_export_desc_t, stype);
	TYPE_FIELD_AS(ze_external_memory_export_desc_t, pNext, next);
	TYPE_FIELD(ze_external_memory_export_desc_t, flags);
	TYPE_SIZE(ze_memory_allocation_properties_t);
	TYPE_FIELD(ze_memory_allocation_properties_t, stype);
	TYPE_FIELD_AS(ze_memory_allocation_properties_t, pNext, next);
	TYPE_FIELD_AS(ze_memory_allocation_properties_t, type, memory_type);
	TYPE_FIELD(ze_memory_allocation_properties_t, id);
	TYPE_FIELD_AS(ze_memory_allocation_properties_t, pageSize, page_size);
	TYPE_SIZE(ze_external_memory_export_fd_t);
	TYPE_FIELD(ze_external_memory_export_fd_t, stype);
	TYPE_FIELD_AS(ze_external_memory_export_fd_t, pNext, next);
	TYPE_FIELD(ze_external_memory_export_fd_t, flags);
	TYPE_FIELD(ze_external_memory_export_fd_t, fd);
	TYPE_SIZE(ze_pci_ext_properties_t);
	TYPE_FIELD(ze_pci_ext_properties_t, stype);
	TYPE_FIELD_AS(ze_pci_ext_properties_t, pNext, next);
	TYPE_FIELD(ze_pci_ext_properties_t, address);
	TYPE_FIELD_AS(ze_pci_ext_properties_t, maxSpeed, max_speed);
	TYPE_SIZE(ze_pci_address_ext_t);
	TYPE_FIELD(ze_pci_address_ext_t, domain);
	TYPE_FIELD(ze_pci_address_ext_t, bus);
	TYPE_FIELD(ze_pci_address_ext_t, device);
	TYPE_FIELD(ze_pci_address_ext_t, function);
	TYPE_SIZE(ze_pci_speed_ext_t);
	TYPE_FIELD_AS(ze_pci_speed_ext_t, genVersion, generation);
	TYPE_FIELD(ze_pci_speed_ext_t, width);
	TYPE_FIELD_AS(ze_pci_speed_ext_t, maxBandwidth, max_bandwidth);
#endif
}
