/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Soft-RoCE memory regions over dma-bufs: the functions that the hooks call.
 */

#ifndef RXE_DMABUF_H
#define RXE_DMABUF_H

#include <rdma/ib_verbs.h>

struct rxe_mr;

/* A registration has a DMA handle (TLP processing hints) since 6.17. */
#ifdef RXE_HAVE_DMAH
#define RXE_DMAH_PARAM	struct ib_dmah *dmah,
#else
#define RXE_DMAH_PARAM
#endif

int rxe_dmabuf_init_device(struct ib_device *ibdev);

struct ib_mr *rxe_reg_user_mr_dmabuf(struct ib_pd *ibpd, u64 offset,
				     u64 length, u64 iova, int fd, int access,
				     RXE_DMAH_PARAM
				     struct uverbs_attr_bundle *attrs);

void rxe_mr_release_umem(struct rxe_mr *mr);

int rxe_mr_check_rereg(struct rxe_mr *mr, int flags, int access);

/* In rxe_mr.c, where it was static up to 6.13. */
void rxe_mr_init(int access, struct rxe_mr *mr);

#endif /* RXE_DMABUF_H */
