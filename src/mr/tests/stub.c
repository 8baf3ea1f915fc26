/* A library with verbs that the installed ones may lack. Each function records its arguments and succeeds,
 * or fails with stub_errno. Types that old headers lack are declared here.
 */
#include <errno.h>
#include <stdint.h>
#include <string.h>

#include <infiniband/verbs.h>

struct dmah {
	struct ibv_context *context;
};

struct dmah_init_attr {
	uint32_t comp_mask;
	uint32_t cpu_id;
	uint8_t ph;
	uint8_t tph_mem_type;
};

struct mr_init_attr {
	size_t length;
	int access;
	uint64_t comp_mask;
	uint64_t iova;
	void *addr;
	int fd;
	uint64_t fd_offset;
	struct dmah *dmah;
	void *buf;
};

/* The last call: the function's number and its arguments in order. */
uint64_t stub_call[16];
/* The errno of the next calls; 0 for success. */
int stub_errno;

static struct ibv_mr mr;
static struct dmah handle;

static void record(uint64_t which, const uint64_t *arguments, size_t count)
{
	memset(stub_call, 0, sizeof(stub_call));
	stub_call[0] = which;
	memcpy(stub_call + 1, arguments, count * sizeof(*arguments));
}
#define RECORD(which, ...)                                                                         \
	do {                                                                                       \
		const uint64_t arguments[] = { __VA_ARGS__ };                                      \
		record(which, arguments, sizeof(arguments) / sizeof(*arguments));                  \
	} while (0)

static struct ibv_mr *registered(struct ibv_pd *pd)
{
	if (stub_errno) {
		errno = stub_errno;
		return NULL;
	}
	mr.context = pd->context;
	mr.pd = pd;
	mr.lkey = 0xaaaa;
	mr.rkey = 0xbbbb;
	return &mr;
}

struct ibv_mr *ibv_reg_mr_ex(struct ibv_pd *pd, struct mr_init_attr *in)
{
	RECORD(1, (uintptr_t)pd, in->length, in->access, in->comp_mask, in->iova, (uintptr_t)in->addr,
	       in->fd, in->fd_offset, (uintptr_t)in->dmah, (uintptr_t)in->buf);
	return registered(pd);
}

struct dmah *ibv_alloc_dmah(struct ibv_context *context, struct dmah_init_attr *attr)
{
	RECORD(2, (uintptr_t)context, attr->comp_mask, attr->cpu_id, attr->ph, attr->tph_mem_type);
	if (stub_errno) {
		errno = stub_errno;
		return NULL;
	}
	handle.context = context;
	return &handle;
}

int ibv_dealloc_dmah(struct dmah *dmah)
{
	RECORD(3, (uintptr_t)dmah);
	return stub_errno;
}

struct ibv_mr *mlx5dv_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t length, uint64_t iova,
				    int fd, int access, int mlx5_access)
{
	RECORD(4, (uintptr_t)pd, offset, length, iova, fd, access, mlx5_access);
	return registered(pd);
}
