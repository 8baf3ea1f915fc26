/* Prints "name=value", with the values of the system's headers, for all layouts that rdma-sys-ext writes
 * by hand. layout.rs compiles this, defines HAVE_* for what the headers have, and compares.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <infiniband/mlx5dv.h>
#include <infiniband/verbs.h>
#include <linux/dma-buf.h>
#include <linux/dma-heap.h>
#include <linux/magic.h>
#include <linux/udmabuf.h>
#include <linux/vfio.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/rdma_cma.h>
#include <rdma/ib_user_ioctl_verbs.h>
#include <rdma/rdma_user_ioctl_cmds.h>

#define NAMED(name, value) printf("%s=%llu\n", name, (unsigned long long)(value))
#define VALUE(value) NAMED(#value, value)
#define SIZE(type) NAMED("struct " #type, sizeof(struct type))
/* A field's offset and size, under its name in Rust. */
#define FIELD_AS(type, field, rust)                                                                \
	do {                                                                                       \
		NAMED(#type "." #rust, offsetof(struct type, field));                              \
		NAMED("sizeof " #type "." #rust, sizeof(((struct type *)0)->field));               \
	} while (0)
#define FIELD(type, field) FIELD_AS(type, field, field)

#include "layout_exporters/exporters.c"

static void uverbs(void)
{
	VALUE(RDMA_VERBS_IOCTL);
	SIZE(ib_uverbs_ioctl_hdr);
	FIELD(ib_uverbs_ioctl_hdr, length);
	FIELD(ib_uverbs_ioctl_hdr, object_id);
	FIELD(ib_uverbs_ioctl_hdr, method_id);
	FIELD(ib_uverbs_ioctl_hdr, num_attrs);
	FIELD(ib_uverbs_ioctl_hdr, reserved1);
	FIELD(ib_uverbs_ioctl_hdr, driver_id);
	FIELD(ib_uverbs_ioctl_hdr, reserved2);
	NAMED("attributes begin at", offsetof(struct ib_uverbs_ioctl_hdr, attrs));
	SIZE(ib_uverbs_attr);
	FIELD(ib_uverbs_attr, attr_id);
	FIELD(ib_uverbs_attr, len);
	FIELD(ib_uverbs_attr, flags);
	FIELD(ib_uverbs_attr, attr_data);
	FIELD(ib_uverbs_attr, data);
	VALUE(UVERBS_ATTR_F_MANDATORY);
	VALUE(UVERBS_ATTR_F_VALID_OUTPUT);
	VALUE(UVERBS_OBJECT_MR);
	VALUE(UVERBS_METHOD_MR_DESTROY);
	VALUE(UVERBS_METHOD_REG_DMABUF_MR);
	VALUE(UVERBS_ATTR_DESTROY_MR_HANDLE);
	VALUE(UVERBS_ATTR_REG_DMABUF_MR_HANDLE);
	VALUE(UVERBS_ATTR_REG_DMABUF_MR_PD_HANDLE);
	VALUE(UVERBS_ATTR_REG_DMABUF_MR_OFFSET);
	VALUE(UVERBS_ATTR_REG_DMABUF_MR_LENGTH);
	VALUE(UVERBS_ATTR_REG_DMABUF_MR_IOVA);
	VALUE(UVERBS_ATTR_REG_DMABUF_MR_FD);
	VALUE(UVERBS_ATTR_REG_DMABUF_MR_ACCESS_FLAGS);
	VALUE(UVERBS_ATTR_REG_DMABUF_MR_RESP_LKEY);
	VALUE(UVERBS_ATTR_REG_DMABUF_MR_RESP_RKEY);
}

static void vfio(void)
{
	VALUE(VFIO_API_VERSION);
	VALUE(VFIO_TYPE1v2_IOMMU);
	VALUE(VFIO_GROUP_FLAGS_VIABLE);
	VALUE(VFIO_DEVICE_FEATURE_GET);
	VALUE(VFIO_DEVICE_FEATURE_PROBE);
	VALUE(VFIO_GET_API_VERSION);
	VALUE(VFIO_SET_IOMMU);
	VALUE(VFIO_GROUP_GET_STATUS);
	VALUE(VFIO_GROUP_SET_CONTAINER);
	VALUE(VFIO_GROUP_GET_DEVICE_FD);
	VALUE(VFIO_DEVICE_FEATURE);
	SIZE(vfio_group_status);
	FIELD(vfio_group_status, argsz);
	FIELD(vfio_group_status, flags);
	SIZE(vfio_device_feature);
	FIELD(vfio_device_feature, argsz);
	FIELD(vfio_device_feature, flags);
#ifdef HAVE_VFIO_DMA_BUF
	VALUE(VFIO_DEVICE_FEATURE_DMA_BUF);
	SIZE(vfio_device_feature_dma_buf);
	FIELD(vfio_device_feature_dma_buf, region_index);
	FIELD(vfio_device_feature_dma_buf, open_flags);
	FIELD(vfio_device_feature_dma_buf, flags);
	FIELD(vfio_device_feature_dma_buf, nr_ranges);
	SIZE(vfio_region_dma_range);
	FIELD(vfio_region_dma_range, offset);
	FIELD(vfio_region_dma_range, length);
#endif
}

static void dma_bufs(void)
{
	VALUE(DMA_BUF_MAGIC);
	VALUE(DMA_BUF_NAME_LEN);
	VALUE(DMA_BUF_SYNC_READ);
	VALUE(DMA_BUF_SYNC_WRITE);
	VALUE(DMA_BUF_SYNC_RW);
	VALUE(DMA_BUF_SYNC_START);
	VALUE(DMA_BUF_SYNC_END);
	VALUE(DMA_BUF_IOCTL_SYNC);
	VALUE(DMA_BUF_SET_NAME_B);
	SIZE(dma_buf_sync);
	FIELD(dma_buf_sync, flags);
#ifdef HAVE_SYNC_FILE
	VALUE(DMA_BUF_IOCTL_EXPORT_SYNC_FILE);
	VALUE(DMA_BUF_IOCTL_IMPORT_SYNC_FILE);
	SIZE(dma_buf_export_sync_file);
	FIELD(dma_buf_export_sync_file, flags);
	FIELD(dma_buf_export_sync_file, fd);
	SIZE(dma_buf_import_sync_file);
	FIELD(dma_buf_import_sync_file, flags);
	FIELD(dma_buf_import_sync_file, fd);
#endif

	VALUE(UDMABUF_FLAGS_CLOEXEC);
	VALUE(UDMABUF_CREATE);
	VALUE(UDMABUF_CREATE_LIST);
	SIZE(udmabuf_create);
	FIELD(udmabuf_create, memfd);
	FIELD(udmabuf_create, flags);
	FIELD(udmabuf_create, offset);
	FIELD(udmabuf_create, size);
	SIZE(udmabuf_create_list);
	FIELD(udmabuf_create_list, flags);
	FIELD(udmabuf_create_list, count);
	NAMED("items begin at", offsetof(struct udmabuf_create_list, list));
	SIZE(udmabuf_create_item);
	FIELD(udmabuf_create_item, memfd);
	FIELD_AS(udmabuf_create_item, __pad, pad);
	FIELD(udmabuf_create_item, offset);
	FIELD(udmabuf_create_item, size);

	VALUE(DMA_HEAP_IOCTL_ALLOC);
	SIZE(dma_heap_allocation_data);
	FIELD(dma_heap_allocation_data, len);
	FIELD(dma_heap_allocation_data, fd);
	FIELD(dma_heap_allocation_data, fd_flags);
	FIELD(dma_heap_allocation_data, heap_flags);
}

/* The types of the functions and operations that Rust calls through pointers. This uses only the
 * declarations in the headers, so the program needs no library.
 */
#define PROTOTYPE(result, function, ...)                                                           \
	_Static_assert(__builtin_types_compatible_p(__typeof__(function), result(__VA_ARGS__)),    \
		       #function " has another type in symbols.rs")

_Static_assert(__builtin_types_compatible_p(__typeof__(((struct verbs_context *)0)->query_port),
					    int (*)(struct ibv_context *, uint8_t,
						    struct ibv_port_attr *, size_t)),
	       "query_port has another type in verbs.rs");
PROTOTYPE(struct ibv_mr *, ibv_reg_dmabuf_mr, struct ibv_pd *, uint64_t, size_t, uint64_t, int, int);
#ifdef HAVE_REG_MR_EX
PROTOTYPE(struct ibv_mr *, ibv_reg_mr_ex, struct ibv_pd *, struct ibv_mr_init_attr *);
PROTOTYPE(struct ibv_dmah *, ibv_alloc_dmah, struct ibv_context *, struct ibv_dmah_init_attr *);
PROTOTYPE(int, ibv_dealloc_dmah, struct ibv_dmah *);
#endif
#ifdef HAVE_DM_EXPORT
PROTOTYPE(int, ibv_dm_export_dmabuf_fd, struct ibv_dm *);
#endif
#ifdef HAVE_BUF
PROTOTYPE(void *, ibv_alloc_buf, struct ibv_pd *, size_t, struct ibv_buf **);
PROTOTYPE(void, ibv_free_buf, struct ibv_buf *);
PROTOTYPE(struct ibv_mr *, ibv_reg_buf_mr, struct ibv_pd *, struct ibv_buf *, void *, size_t, int);
#endif
#ifdef HAVE_BUF_EXPORT
PROTOTYPE(int, ibv_export_buf_dmabuf_fd, struct ibv_buf *);
#endif
#ifdef HAVE_MLX5_REG_DMABUF
PROTOTYPE(struct ibv_mr *, mlx5dv_reg_dmabuf_mr, struct ibv_pd *, uint64_t, size_t, uint64_t, int,
	  int, int);
#endif

static void libraries(void)
{
	/* struct verbs_context grows at its front, so distances count from its end. */
	size_t begin = offsetof(struct verbs_context, query_port);

	NAMED("struct BeforeContext", offsetof(struct verbs_context, context) - begin);
	NAMED("BeforeContext.sz", offsetof(struct verbs_context, sz) - begin);
	VALUE((uintptr_t)__VERBS_ABI_IS_EXTENDED);
	SIZE(ibv_context);
	FIELD(ibv_context, ops);
	FIELD(ibv_context, cmd_fd);
	FIELD(ibv_context, abi_compat);
	FIELD(ibv_context_ops, poll_cq);
	FIELD(ibv_context_ops, req_notify_cq);
	FIELD(ibv_context_ops, post_send);
	FIELD(ibv_context_ops, post_recv);
	FIELD(ibv_qp, context);
	FIELD(ibv_cq, context);
	FIELD(ibv_pd, handle);
	SIZE(ibv_gid_entry);
	SIZE(ibv_wc);
	SIZE(ibv_sge);
	SIZE(ibv_send_wr);
	SIZE(ibv_recv_wr);
	FIELD(ibv_port_attr, port_cap_flags2);

#ifdef HAVE_REG_MR_EX
	VALUE(IBV_REG_MR_MASK_IOVA);
	VALUE(IBV_REG_MR_MASK_ADDR);
	VALUE(IBV_REG_MR_MASK_FD);
	VALUE(IBV_REG_MR_MASK_FD_OFFSET);
	VALUE(IBV_REG_MR_MASK_DMAH);
	FIELD(ibv_mr_init_attr, length);
	FIELD(ibv_mr_init_attr, access);
	FIELD(ibv_mr_init_attr, comp_mask);
	FIELD(ibv_mr_init_attr, iova);
	FIELD(ibv_mr_init_attr, addr);
	FIELD(ibv_mr_init_attr, fd);
	FIELD(ibv_mr_init_attr, fd_offset);
	FIELD(ibv_mr_init_attr, dmah);
	SIZE(ibv_dmah);
	FIELD(ibv_dmah, context);
	SIZE(ibv_dmah_init_attr);
	FIELD(ibv_dmah_init_attr, comp_mask);
	FIELD(ibv_dmah_init_attr, cpu_id);
	FIELD(ibv_dmah_init_attr, ph);
	FIELD(ibv_dmah_init_attr, tph_mem_type);
	VALUE(IBV_DMAH_INIT_ATTR_MASK_CPU_ID);
	VALUE(IBV_DMAH_INIT_ATTR_MASK_PH);
	VALUE(IBV_DMAH_INIT_ATTR_MASK_TPH_MEM_TYPE);
	VALUE(IBV_TPH_MEM_TYPE_VM);
	VALUE(IBV_TPH_MEM_TYPE_PM);
#endif
#ifdef HAVE_BUF
	VALUE(IBV_REG_MR_MASK_BUF);
	SIZE(ibv_mr_init_attr);
	FIELD(ibv_mr_init_attr, buf);
#endif
#ifdef HAVE_MLX5_REG_DMABUF
	VALUE(MLX5DV_REG_DMABUF_ACCESS_DATA_DIRECT);
#endif
}

static void connections(void)
{
	VALUE(RDMA_CM_EVENT_ADDR_RESOLVED);
	VALUE(RDMA_CM_EVENT_ADDR_ERROR);
	VALUE(RDMA_CM_EVENT_ROUTE_RESOLVED);
	VALUE(RDMA_CM_EVENT_ROUTE_ERROR);
	VALUE(RDMA_CM_EVENT_CONNECT_REQUEST);
	VALUE(RDMA_CM_EVENT_CONNECT_RESPONSE);
	VALUE(RDMA_CM_EVENT_CONNECT_ERROR);
	VALUE(RDMA_CM_EVENT_UNREACHABLE);
	VALUE(RDMA_CM_EVENT_REJECTED);
	VALUE(RDMA_CM_EVENT_ESTABLISHED);
	VALUE(RDMA_CM_EVENT_DISCONNECTED);
	VALUE(RDMA_CM_EVENT_DEVICE_REMOVAL);
	VALUE(RDMA_CM_EVENT_ADDR_CHANGE);
	VALUE(RDMA_CM_EVENT_TIMEWAIT_EXIT);
	VALUE(RDMA_PS_TCP);
	SIZE(rdma_event_channel);
	FIELD(rdma_event_channel, fd);
	SIZE(rdma_ib_addr);
	FIELD(rdma_ib_addr, sgid);
	FIELD(rdma_ib_addr, dgid);
	FIELD(rdma_ib_addr, pkey);
	SIZE(rdma_addr);
	FIELD(rdma_addr, src_storage);
	FIELD(rdma_addr, dst_storage);
	FIELD_AS(rdma_addr, addr.ibaddr, ibaddr);
	SIZE(rdma_route);
	FIELD(rdma_route, addr);
	FIELD(rdma_route, path_rec);
	FIELD(rdma_route, num_paths);
	SIZE(rdma_cm_id);
	FIELD(rdma_cm_id, verbs);
	FIELD(rdma_cm_id, channel);
	FIELD(rdma_cm_id, context);
	FIELD(rdma_cm_id, qp);
	FIELD(rdma_cm_id, route);
	FIELD(rdma_cm_id, ps);
	FIELD(rdma_cm_id, port_num);
	FIELD(rdma_cm_id, event);
	NAMED("six objects begin at", offsetof(struct rdma_cm_id, send_cq_channel));
	FIELD(rdma_cm_id, qp_type);
	SIZE(rdma_conn_param);
	FIELD(rdma_conn_param, private_data);
	FIELD(rdma_conn_param, private_data_len);
	FIELD(rdma_conn_param, responder_resources);
	FIELD(rdma_conn_param, initiator_depth);
	FIELD(rdma_conn_param, flow_control);
	FIELD(rdma_conn_param, retry_count);
	FIELD(rdma_conn_param, rnr_retry_count);
	FIELD(rdma_conn_param, srq);
	FIELD(rdma_conn_param, qp_num);
	SIZE(rdma_ud_param);
	FIELD(rdma_ud_param, private_data);
	FIELD(rdma_ud_param, private_data_len);
	FIELD(rdma_ud_param, ah_attr);
	FIELD(rdma_ud_param, qp_num);
	FIELD(rdma_ud_param, qkey);
	SIZE(rdma_cm_event);
	FIELD(rdma_cm_event, id);
	FIELD(rdma_cm_event, listen_id);
	FIELD(rdma_cm_event, event);
	FIELD(rdma_cm_event, status);
	FIELD(rdma_cm_event, param);
}

PROTOTYPE(struct rdma_event_channel *, rdma_create_event_channel, void);
PROTOTYPE(void, rdma_destroy_event_channel, struct rdma_event_channel *);
PROTOTYPE(int, rdma_create_id, struct rdma_event_channel *, struct rdma_cm_id **, void *,
	  enum rdma_port_space);
PROTOTYPE(int, rdma_destroy_id, struct rdma_cm_id *);
PROTOTYPE(int, rdma_migrate_id, struct rdma_cm_id *, struct rdma_event_channel *);
PROTOTYPE(int, rdma_bind_addr, struct rdma_cm_id *, struct sockaddr *);
PROTOTYPE(int, rdma_resolve_addr, struct rdma_cm_id *, struct sockaddr *, struct sockaddr *, int);
PROTOTYPE(int, rdma_resolve_route, struct rdma_cm_id *, int);
PROTOTYPE(int, rdma_listen, struct rdma_cm_id *, int);
PROTOTYPE(int, rdma_connect, struct rdma_cm_id *, struct rdma_conn_param *);
PROTOTYPE(int, rdma_accept, struct rdma_cm_id *, struct rdma_conn_param *);
PROTOTYPE(int, rdma_reject, struct rdma_cm_id *, const void *, uint8_t);
PROTOTYPE(int, rdma_establish, struct rdma_cm_id *);
PROTOTYPE(int, rdma_init_qp_attr, struct rdma_cm_id *, struct ibv_qp_attr *, int *);
PROTOTYPE(int, rdma_disconnect, struct rdma_cm_id *);
PROTOTYPE(int, rdma_get_cm_event, struct rdma_event_channel *, struct rdma_cm_event **);
PROTOTYPE(int, rdma_ack_cm_event, struct rdma_cm_event *);

int main(void)
{
	uverbs();
	dma_bufs();
	vfio();
	libraries();
	connections();
	exporters();
	return 0;
}
