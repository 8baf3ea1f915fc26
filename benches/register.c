/* The least that registers and deregisters a dma-buf, for register.rs to measure the library against:
 * each is one command, filled in and given to the kernel, without a check that is not the kernel's.
 */
#include <errno.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

#include <infiniband/verbs.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/ib_user_ioctl_verbs.h>
#include <rdma/rdma_user_ioctl_cmds.h>

struct reg_dmabuf_mr {
	struct ib_uverbs_ioctl_hdr header;
	struct ib_uverbs_attr attrs[9];
};

struct mr_destroy {
	struct ib_uverbs_ioctl_hdr header;
	struct ib_uverbs_attr attrs[1];
};

#define HEADER(type, method) {                                                                     \
	.length = sizeof(struct type),                                                             \
	.object_id = UVERBS_OBJECT_MR,                                                             \
	.method_id = method,                                                                       \
	.num_attrs = sizeof(((struct type *)0)->attrs) / sizeof(struct ib_uverbs_attr),            \
	.reserved1 = 0,                                                                            \
	.driver_id = RDMA_DRIVER_RXE,                                                              \
	.reserved2 = 0,                                                                            \
}
#define ATTR(id, size, value) {                                                                    \
	.attr_id = id,                                                                             \
	.len = size,                                                                               \
	.flags = UVERBS_ATTR_F_MANDATORY,                                                          \
	.attr_data.reserved = 0,                                                                   \
	.data = value,                                                                             \
}

struct mr {
	uint32_t handle, lkey, rkey;
};

static int reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, uint64_t length, uint64_t iova, int fd,
			 uint32_t access, struct mr *mr)
{
	struct reg_dmabuf_mr reg = {
		HEADER(reg_dmabuf_mr, UVERBS_METHOD_REG_DMABUF_MR),
		{
			ATTR(UVERBS_ATTR_REG_DMABUF_MR_HANDLE, 0, 0),
			ATTR(UVERBS_ATTR_REG_DMABUF_MR_PD_HANDLE, 0, pd->handle),
			ATTR(UVERBS_ATTR_REG_DMABUF_MR_OFFSET, 8, offset),
			ATTR(UVERBS_ATTR_REG_DMABUF_MR_LENGTH, 8, length),
			ATTR(UVERBS_ATTR_REG_DMABUF_MR_IOVA, 8, iova),
			ATTR(UVERBS_ATTR_REG_DMABUF_MR_FD, 4, (uint32_t)fd),
			ATTR(UVERBS_ATTR_REG_DMABUF_MR_ACCESS_FLAGS, 4, access),
			ATTR(UVERBS_ATTR_REG_DMABUF_MR_RESP_LKEY, 4, (uintptr_t)&mr->lkey),
			ATTR(UVERBS_ATTR_REG_DMABUF_MR_RESP_RKEY, 4, (uintptr_t)&mr->rkey),
		},
	};
	int result = ioctl(pd->context->cmd_fd, RDMA_VERBS_IOCTL, &reg);

	mr->handle = reg.attrs[0].data;
	return result;
}

static int mr_destroy(struct ibv_context *context, uint32_t handle)
{
	struct mr_destroy destroy = {
		HEADER(mr_destroy, UVERBS_METHOD_MR_DESTROY),
		{ ATTR(UVERBS_ATTR_DESTROY_MR_HANDLE, 0, handle) },
	};

	return ioctl(context->cmd_fd, RDMA_VERBS_IOCTL, &destroy);
}

/* Registers and deregisters so many times; returns the nanoseconds that it took, or -errno. */
int64_t bare_register(struct ibv_pd *pd, int fd, uint64_t length, uint32_t access, uint64_t times)
{
	struct timespec start, end;

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (uint64_t i = 0; i < times; i++) {
		struct mr mr;

		if (reg_dmabuf_mr(pd, 0, length, 0, fd, access, &mr))
			return -errno;
		if (mr_destroy(pd->context, mr.handle))
			return -errno;
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	return (end.tv_sec - start.tv_sec) * 1000000000LL + end.tv_nsec - start.tv_nsec;
}
