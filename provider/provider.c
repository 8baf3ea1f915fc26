/*
 * The provider of soft-RoCE, with ibv_reg_dmabuf_mr and with the profiles of other devices.
 *
 * rxe.c of rdma-core has neither. This file includes it, registers its driver with another alloc_context, and puts
 * a few operations before its own.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <infiniband/driver.h>

/* rxe.c must not register its own driver. */
#pragma push_macro("PROVIDER_DRIVER")
#undef PROVIDER_DRIVER
#define PROVIDER_DRIVER(name, driver)
#include "rxe.c"
#pragma pop_macro("PROVIDER_DRIVER")

#include "profile.h"

/* soft-RoCE itself. */
static const struct profile plain = {};

/* rxe.c finds its own context at the start. */
struct profiled_context {
	struct rxe_context rxe;
	const struct profile *profile;
};

static const struct profile *profile_of(struct ibv_context *context)
{
	return container_of(to_rctx(context), struct profiled_context, rxe)->profile;
}

/* RXE_MAX_QP_RD_ATOM of the kernel: a profile may permit more. */
#define RXE_RD_ATOMIC 128

static int query_device(struct ibv_context *context, const struct ibv_query_device_ex_input *input,
			struct ibv_device_attr_ex *attr, size_t size)
{
	const struct profile *profile = profile_of(context);
	int ret = rxe_query_device(context, input, attr, size);

	if (!ret && profile->device)
		profile->device(&attr->orig_attr);
	return ret;
}

static int query_port(struct ibv_context *context, uint8_t port, struct ibv_port_attr *attr)
{
	const struct profile *profile = profile_of(context);
	int ret = rxe_query_port(context, port, attr);

	if (!ret && profile->port)
		profile->port(attr);
	return ret;
}

static struct ibv_cq *create_cq(struct ibv_context *context, int cqe, struct ibv_comp_channel *channel, int vector)
{
	const struct profile *profile = profile_of(context);
	int ret = profile->create_cq ? profile->create_cq(channel) : 0;

	if (!ret)
		return rxe_create_cq(context, cqe, channel, vector);
	errno = ret;
	return NULL;
}

static bool permits_qp(struct ibv_context *context, enum ibv_qp_type type, const struct ibv_qp_cap *cap)
{
	const struct profile *profile = profile_of(context);
	int ret = profile->create_qp ? profile->create_qp(type, cap) : 0;

	if (ret)
		errno = ret;
	return !ret;
}

static struct ibv_qp *create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
	return permits_qp(pd->context, attr->qp_type, &attr->cap) ? rxe_create_qp(pd, attr) : NULL;
}

static struct ibv_qp *create_qp_ex(struct ibv_context *context, struct ibv_qp_init_attr_ex *attr)
{
	return permits_qp(context, attr->qp_type, &attr->cap) ? rxe_create_qp_ex(context, attr) : NULL;
}

static int modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
{
	const struct profile *profile = profile_of(qp->context);
	struct ibv_qp_attr ours = *attr;
	int ret = profile->modify_qp ? profile->modify_qp(attr, mask) : 0;

	if (ret)
		return ret;
	if (ours.max_rd_atomic > RXE_RD_ATOMIC)
		ours.max_rd_atomic = RXE_RD_ATOMIC;
	if (ours.max_dest_rd_atomic > RXE_RD_ATOMIC)
		ours.max_dest_rd_atomic = RXE_RD_ATOMIC;
	/* No queue pair of soft-RoCE has a number this large. */
	if (profile->silent && mask & IBV_QP_DEST_QPN)
		ours.dest_qp_num |= 0x800000;
	if (profile->silent && mask & IBV_QP_TIMEOUT)
		ours.timeout = 0;
	return rxe_modify_qp(qp, &ours, mask);
}

static struct ibv_mr *reg_mr(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, int access)
{
	const struct profile *profile = profile_of(pd->context);
	int ret = profile->reg_mr ? profile->reg_mr(length, access) : 0;

	if (!ret)
		return rxe_reg_mr(pd, addr, length, iova, access);
	errno = ret;
	return NULL;
}

/* Registers pages that nothing else maps, which the kernel keeps until the region is gone. */
static struct ibv_mr *reg_stray_pages(struct ibv_pd *pd, size_t length, uint64_t iova, int access)
{
	size_t page = sysconf(_SC_PAGESIZE), in_page = iova % page;
	char *pages = mmap(NULL, in_page + length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct ibv_mr *mr;

	if (pages == MAP_FAILED)
		return NULL;
	mr = rxe_reg_mr(pd, pages + in_page, length, iova, access);
	munmap(pages, in_page + length);
	return mr;
}

static struct ibv_mr *reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t length, uint64_t iova, int fd,
				    int access)
{
	const struct profile *profile = profile_of(pd->context);
	int ret = profile->reg_mr ? profile->reg_mr(length, access) : 0;
	struct verbs_mr *vmr;

	if (ret) {
		errno = ret;
		return NULL;
	}
	if (profile->probe_errno && fd < 0) {
		errno = profile->probe_errno;
		return NULL;
	}
	if (profile->stray_pages && fd >= 0)
		return reg_stray_pages(pd, length, iova, access);
	vmr = calloc(1, sizeof(*vmr));
	if (!vmr)
		return NULL;
	ret = ibv_cmd_reg_dmabuf_mr(pd, offset, length, iova, fd, access, vmr, NULL);
	if (ret) {
		free(vmr);
		errno = ret;
		return NULL;
	}
	if (profile->dmabuf_errno) {
		rxe_dereg_mr(vmr);
		errno = profile->dmabuf_errno;
		return NULL;
	}
	if (profile->dead_keys) {
		/* The index of another object, in the upper bits. */
		vmr->ibv_mr.lkey ^= 0x40000000;
		vmr->ibv_mr.rkey ^= 0x40000000;
	}
	return &vmr->ibv_mr;
}

static const struct verbs_context_ops ops = {
	.query_device_ex = query_device,
	.query_port = query_port,
	.create_cq = create_cq,
	.create_qp = create_qp,
	.create_qp_ex = create_qp_ex,
	.modify_qp = modify_qp,
	.reg_mr = reg_mr,
	.reg_dmabuf_mr = reg_dmabuf_mr,
};

/* As rxe_alloc_context, with room for the profile. */
static struct verbs_context *alloc_context(struct ibv_device *device, int cmd_fd, void *private_data)
{
	const char *name = getenv("DMABUF_RDMA_PROFILE");
	const struct profile *profile = name && *name ? profile_named(name) : &plain;
	struct ib_uverbs_get_context_resp resp;
	struct profiled_context *context;
	struct ibv_get_context cmd;

	if (!profile) {
		fprintf(stderr, "DMABUF_RDMA_PROFILE=%s: no such profile; provider/profiles.c lists them\n", name);
		errno = EINVAL;
		return NULL;
	}
	context = verbs_init_and_alloc_context(device, cmd_fd, context, rxe.ibv_ctx, RDMA_DRIVER_RXE);
	if (!context)
		return NULL;
	if (ibv_cmd_get_context(&context->rxe.ibv_ctx, &cmd, sizeof(cmd), &resp, sizeof(resp))) {
		verbs_uninit_context(&context->rxe.ibv_ctx);
		free(context);
		return NULL;
	}
	context->profile = profile;
	verbs_set_ops(&context->rxe.ibv_ctx, &rxe_ctx_ops);
	verbs_set_ops(&context->rxe.ibv_ctx, &ops);
	return &context->rxe.ibv_ctx;
}

static __attribute__((constructor)) void register_driver(void)
{
	static struct verbs_device_ops driver;

	driver = rxe_dev_ops;
	driver.alloc_context = alloc_context;
	verbs_register_driver(&driver);
}
