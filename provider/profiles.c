/*
 * The profiles. Each comment names the source of the driver (Linux 6.12 unless it says another) or of the provider
 * (rdma-core 55) that behaves so. Numbers that a driver reads from its firmware are examples.
 */

#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>

#include "profile.h"

#define OPTIONAL_ACCESS IBV_ACCESS_OPTIONAL_RANGE
#define K4 (1ULL << 12)
#define M2 (1ULL << 21)
#define G1 (1ULL << 30)

/* mlx5: a function whose firmware reports no atomics (mlx5/main.c, get_atomic_caps and mlx5_ib_query_device). */

static void mlx5_device(struct ibv_device_attr *attr)
{
	attr->max_mr_size = UINT64_MAX;
	attr->page_size_cap = ~(K4 - 1);
	attr->max_sge = 30;
	attr->max_sge_rd = 30;
	attr->max_qp_rd_atom = 16;
	attr->max_qp_init_rd_atom = 16;
	attr->atomic_cap = IBV_ATOMIC_NONE;
}

/* mlx5/qp.c: set_qpc_atomic_flags, validate_rd_atomic. */
static int mlx5_modify_qp(const struct ibv_qp_attr *attr, int mask)
{
	if (mask & IBV_QP_ACCESS_FLAGS && attr->qp_access_flags & IBV_ACCESS_REMOTE_ATOMIC)
		return EOPNOTSUPP;
	if (mask & IBV_QP_MAX_QP_RD_ATOMIC && attr->max_rd_atomic > 16)
		return EINVAL;
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC && attr->max_dest_rd_atomic > 16)
		return EINVAL;
	return 0;
}

/* efa: efa/efa_verbs.c, efa_query_device and efa_query_port; all that they leave out is 0. */

static void efa_device(struct ibv_device_attr *attr)
{
	attr->max_mr_size = 1ULL << 40;
	attr->page_size_cap = 0xfffff000;
	attr->max_qp_wr = 4096;
	attr->max_sge = 2;
	attr->max_sge_rd = 1;
	attr->max_cqe = 32768;
	attr->max_qp_rd_atom = 0;
	attr->max_qp_init_rd_atom = 0;
	attr->atomic_cap = IBV_ATOMIC_NONE;
}

static void efa_port(struct ibv_port_attr *attr)
{
	attr->max_msg_sz = 8928;
	attr->gid_tbl_len = 1;
}

/* providers/efa/verbs.c, create_cq: an older device notifies of no completions. */
static int efa_first_create_cq(const struct ibv_comp_channel *channel)
{
	return channel ? EOPNOTSUPP : 0;
}

/* providers/efa/verbs.c, efa_create_qp. */
static int efa_create_qp(enum ibv_qp_type type, const struct ibv_qp_cap *cap)
{
	return type == IBV_QPT_UD ? 0 : EOPNOTSUPP;
}

/* efa/efa_verbs.c, efa_alloc_mr: devices that write remotely, and older ones that only read. */
static int efa_reg_mr(size_t length, int access)
{
	int supported = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;

	return access & ~OPTIONAL_ACCESS & ~supported ? EOPNOTSUPP : 0;
}

static int efa_first_reg_mr(size_t length, int access)
{
	int supported = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ;

	return access & ~OPTIONAL_ACCESS & ~supported ? EOPNOTSUPP : 0;
}

/* irdma on an E810: irdma/verbs.c, irdma_query_device; irdma/icrdma_hw.h, irdma/user.h, irdma/defs.h. */

#define IRDMA_MAX_MR_SIZE 0x200000000000ULL
#define IRDMA_FRAGMENTS 13
#define IRDMA_IRD 127
#define IRDMA_ORD 255

static void irdma_device(struct ibv_device_attr *attr)
{
	attr->max_mr_size = IRDMA_MAX_MR_SIZE;
	attr->page_size_cap = K4 | M2 | G1;
	attr->max_qp_wr = 4063;
	attr->max_sge = IRDMA_FRAGMENTS;
	attr->max_sge_rd = IRDMA_FRAGMENTS;
	attr->max_qp_rd_atom = IRDMA_IRD;
	attr->max_qp_init_rd_atom = IRDMA_ORD;
	attr->atomic_cap = IBV_ATOMIC_NONE;
}

/* irdma_validate_qp_attrs. */
static int irdma_create_qp(enum ibv_qp_type type, const struct ibv_qp_cap *cap)
{
	bool fits = cap->max_send_sge <= IRDMA_FRAGMENTS && cap->max_recv_sge <= IRDMA_FRAGMENTS;

	return fits ? 0 : EINVAL;
}

/* irdma_modify_qp_roce. */
static int irdma_modify_qp(const struct ibv_qp_attr *attr, int mask)
{
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC && attr->max_dest_rd_atomic > IRDMA_IRD)
		return EINVAL;
	return 0;
}

/* irdma_reg_user_mr_dmabuf; it ignores REMOTE_ATOMIC (irdma_get_mr_access). */
static int irdma_reg_mr(size_t length, int access)
{
	return length > IRDMA_MAX_MR_SIZE ? EINVAL : 0;
}

/* bnxt_re: bnxt_re/ib_verbs.c, bnxt_re_query_device; bnxt_re/bnxt_re.h. */

#define BNXT_RE_MAX_MR_SIZE (1ULL << 39)
#define BNXT_RE_RD_ATOM 126
#define BNXT_RE_INIT_RD_ATOM 64

static void bnxt_re_device(struct ibv_device_attr *attr)
{
	attr->max_mr_size = BNXT_RE_MAX_MR_SIZE;
	attr->page_size_cap = 0x7ffff000;
	attr->max_sge = 6;
	attr->max_sge_rd = 6;
	attr->max_qp_rd_atom = BNXT_RE_RD_ATOM;
	attr->max_qp_init_rd_atom = BNXT_RE_INIT_RD_ATOM;
	attr->atomic_cap = IBV_ATOMIC_NONE;
}

/* bnxt_re_modify_qp compares what a queue pair serves with what the device keeps in flight. */
static int bnxt_re_modify_qp(const struct ibv_qp_attr *attr, int mask)
{
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC && attr->max_dest_rd_atomic > BNXT_RE_INIT_RD_ATOM)
		return EINVAL;
	return 0;
}

/* __bnxt_re_user_reg_mr. */
static int bnxt_re_reg_mr(size_t length, int access)
{
	return length > BNXT_RE_MAX_MR_SIZE ? ENOMEM : 0;
}

/* mana: mana/main.c, mana_ib_query_device; the figures are those of its adapter. */

static void mana_device(struct ibv_device_attr *attr)
{
	attr->max_mr_size = UINT64_MAX;
	attr->page_size_cap = K4 | 2 * K4 | 4 * K4 | 8 * K4 | 16 * K4 | M2;
	attr->max_sge = 6;
	attr->max_sge_rd = 15;
	attr->max_qp_rd_atom = 32;
	attr->max_qp_init_rd_atom = 32;
	attr->atomic_cap = IBV_ATOMIC_NONE;
}

/* mana/mr.c of Linux 7.3: VALID_MR_FLAGS, mana_ib_reg_user_mr_dmabuf. */
static int mana_reg_mr(size_t length, int access)
{
	int supported = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;

	return access & ~OPTIONAL_ACCESS & ~supported ? EOPNOTSUPP : 0;
}

/* Devices that report the same figure for every limit. */

static void all_limits(struct ibv_device_attr *attr, uint64_t large, int limit)
{
	attr->max_mr_size = large;
	attr->page_size_cap = large;
	attr->max_qp = limit;
	attr->max_qp_wr = limit;
	attr->max_sge = limit;
	attr->max_sge_rd = limit;
	attr->max_cq = limit;
	attr->max_cqe = limit;
	attr->max_mr = limit;
	attr->max_pd = limit;
	attr->max_qp_rd_atom = limit;
	attr->max_ee_rd_atom = limit;
	attr->max_res_rd_atom = limit;
	attr->max_qp_init_rd_atom = limit;
	attr->max_ee_init_rd_atom = limit;
	attr->max_ah = limit;
	attr->max_srq = limit;
	attr->max_srq_wr = limit;
	attr->max_srq_sge = limit;
	attr->max_pkeys = limit > UINT16_MAX ? UINT16_MAX : limit;
	attr->phys_port_cnt = limit > UINT8_MAX ? UINT8_MAX : limit;
}

static void zero_device(struct ibv_device_attr *attr)
{
	all_limits(attr, 0, 0);
}

static void zero_port(struct ibv_port_attr *attr)
{
	attr->max_msg_sz = 0;
	attr->gid_tbl_len = 0;
}

static void one_device(struct ibv_device_attr *attr)
{
	all_limits(attr, 1, 1);
}

static void one_port(struct ibv_port_attr *attr)
{
	attr->max_msg_sz = 1;
	attr->gid_tbl_len = 1;
}

static void largest_device(struct ibv_device_attr *attr)
{
	all_limits(attr, UINT64_MAX, INT_MAX);
}

static void largest_port(struct ibv_port_attr *attr)
{
	attr->max_msg_sz = UINT32_MAX;
	attr->gid_tbl_len = INT_MAX;
}

static const struct profile profiles[] = {
	{ .name = "mlx5-without-atomics", .device = mlx5_device, .modify_qp = mlx5_modify_qp },
	{ .name = "efa", .device = efa_device, .port = efa_port, .create_qp = efa_create_qp, .reg_mr = efa_reg_mr },
	{
		.name = "efa-first",
		.device = efa_device,
		.port = efa_port,
		.create_cq = efa_first_create_cq,
		.create_qp = efa_create_qp,
		.reg_mr = efa_first_reg_mr,
	},
	{
		.name = "irdma",
		.device = irdma_device,
		.create_qp = irdma_create_qp,
		.modify_qp = irdma_modify_qp,
		.reg_mr = irdma_reg_mr,
	},
	{ .name = "bnxt_re", .device = bnxt_re_device, .modify_qp = bnxt_re_modify_qp, .reg_mr = bnxt_re_reg_mr },
	{ .name = "mana", .device = mana_device, .reg_mr = mana_reg_mr },
	{ .name = "limits-zero", .device = zero_device, .port = zero_port },
	{ .name = "limits-one", .device = one_device, .port = one_port },
	{ .name = "limits-largest", .device = largest_device, .port = largest_port },
	/* What CUDA's memory is to a NIC that registers it for the wrong PCIe path. */
	{ .name = "dead-keys", .dead_keys = true },
	/* The kernel's internal ENOTSUPP, which NVIDIA's driver returns on GB200. */
	{ .name = "errno-524", .dmabuf_errno = 524 },
	/* A device that maps pages which the buffer has left. */
	{ .name = "stray-pages", .stray_pages = true },
	/* A driver that fails before it looks at the descriptor, as after an error of its firmware. */
	{ .name = "probe-eio", .probe_errno = EIO },
	/* A link that carries nothing, on queue pairs with the local ACK timeout 0, which is infinite. */
	{ .name = "silent", .silent = true },
};

const struct profile *profile_named(const char *name)
{
	for (size_t i = 0; i < sizeof(profiles) / sizeof(profiles[0]); i++)
		if (!strcmp(profiles[i].name, name))
			return &profiles[i];
	return NULL;
}
