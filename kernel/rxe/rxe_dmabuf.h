/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Soft-RoCE memory regions over dma-bufs: the functions that the hooks call.
 */

#ifndef RXE_DMABUF_H
#define RXE_DMABUF_H

#include <linux/version.h>
#include <rdma/ib_umem.h>
#include <rdma/ib_verbs.h>

/*
 * A registration has a DMA handle (TLP processing hints) since 6.17. The hooks
 * fit 6.12 and 7 only, so the test for 7 is enough.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
#define RXE_DMAH_PARAM	struct ib_dmah *dmah,
#else
#define RXE_DMAH_PARAM
#endif

int rxe_dmabuf_init_device(struct ib_device *ibdev);

struct ib_mr *rxe_reg_user_mr_dmabuf(struct ib_pd *ibpd, u64 offset,
				     u64 length, u64 iova, int fd, int access,
				     RXE_DMAH_PARAM
				     struct uverbs_attr_bundle *attrs);

void rxe_umem_release(struct ib_umem *umem);

#endif /* RXE_DMABUF_H */
