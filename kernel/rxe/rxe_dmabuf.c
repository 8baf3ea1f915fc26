// SPDX-License-Identifier: GPL-2.0
/*
 * Soft-RoCE memory regions over dma-bufs.
 *
 * rxe copies with the CPU, through an array with one struct page per page of
 * the MR. To import a dma-buf, attach to it, fill that array from its
 * scatterlist, and keep the attachment until the MR is gone. The rest of rxe
 * treats such an MR like one over pinned user memory.
 */

#include <linux/dma-buf.h>
#include <linux/dma-map-ops.h>
#include <linux/dma-resv.h>
#include <linux/module.h>
#include <linux/overflow.h>
#include <linux/pfn.h>
#include <rdma/ib_umem.h>

#include "rxe.h"
#include "rxe_loc.h"
#include "rxe_dmabuf.h"

/* The expansion of MODULE_IMPORT_NS(), which takes a string since 6.13. */
MODULE_INFO(import_ns, "DMA_BUF");

/* features.mk checks what this kernel has and defines RXE_HAVE_*. */

/*
 * Identity DMA mapping, for a device whose DMA engine is the CPU.
 *
 * An exporter maps its pages for the attached device. The default operations
 * may bounce that mapping (swiotlb=force, memory encryption). Unmapping would
 * then copy the bounce buffer over pages that rxe, which ignores DMA addresses,
 * has written in the meantime. There are no sync operations: the CPU's copies
 * are coherent with all other CPU accesses.
 */
#ifdef RXE_HAVE_MAP_PHYS
static dma_addr_t rxe_dma_map_phys(struct device *dev, phys_addr_t phys,
				   size_t size, enum dma_data_direction dir,
				   unsigned long attrs)
{
	return phys;
}
#else
static dma_addr_t rxe_dma_map_page(struct device *dev, struct page *page,
				   unsigned long offset, size_t size,
				   enum dma_data_direction dir,
				   unsigned long attrs)
{
	return page_to_phys(page) + offset;
}

/*
 * Exporters map memory without struct pages (a BAR) through this. It succeeds,
 * so that rxe_dmabuf_fill_pages() refuses such memory with its own errno.
 */
static dma_addr_t rxe_dma_map_resource(struct device *dev, phys_addr_t phys,
				       size_t size, enum dma_data_direction dir,
				       unsigned long attrs)
{
	return phys;
}
#endif

static void rxe_dma_unmap(struct device *dev, dma_addr_t addr, size_t size,
			  enum dma_data_direction dir, unsigned long attrs)
{
}

static int rxe_dma_map_sg(struct device *dev, struct scatterlist *sgl,
			  int nents, enum dma_data_direction dir,
			  unsigned long attrs)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(sgl, sg, nents, i) {
		sg_dma_address(sg) = sg_phys(sg);
		sg_dma_len(sg) = sg->length;
	}

	return nents;
}

static void rxe_dma_unmap_sg(struct device *dev, struct scatterlist *sgl,
			     int nents, enum dma_data_direction dir,
			     unsigned long attrs)
{
}

static const struct dma_map_ops rxe_dma_map_ops = {
#ifdef RXE_HAVE_MAP_PHYS
	.map_phys = rxe_dma_map_phys,
	.unmap_phys = rxe_dma_unmap,
#else
	.map_page = rxe_dma_map_page,
	.unmap_page = rxe_dma_unmap,
	.map_resource = rxe_dma_map_resource,
#endif
	.map_sg = rxe_dma_map_sg,
	.unmap_sg = rxe_dma_unmap_sg,
};

/* The CPU copies segments of any length. */
static struct device_dma_parameters rxe_dma_parameters = {
	.max_segment_size = UINT_MAX,
	.segment_boundary_mask = ULONG_MAX,
};

/*
 * Whether devices that are made from now on can be removed while processes use
 * them, as a NIC that is unplugged: their objects are destroyed at once, and
 * every context gets IB_EVENT_DEVICE_FATAL. Stock rxe waits for the processes.
 */
static bool unplug;
module_param(unplug, bool, 0644);
MODULE_PARM_DESC(unplug, "New devices can be removed while they are in use");

/*
 * Nothing to revoke: a queue that is mapped has its own reference, and outlives
 * the device. Its mapping calls back into this module, so the module stays.
 */
static void rxe_disassociate_ucontext(struct ib_ucontext *context)
{
	__module_get(THIS_MODULE);
}

static const struct ib_device_ops rxe_unplug_ops = {
	.disassociate_ucontext = rxe_disassociate_ucontext,
};

/*
 * Prepare the ib_device's own struct device for mappings by an exporter.
 * ib_device.dma_device stays NULL, so the RDMA core and its clients still treat
 * rxe as a device that takes virtual addresses.
 */
int rxe_dmabuf_init_device(struct ib_device *ibdev)
{
	set_dma_ops(&ibdev->dev, &rxe_dma_map_ops);
	ibdev->dev.dma_parms = &rxe_dma_parameters;
	if (unplug)
		ib_set_device_ops(ibdev, &rxe_unplug_ops);

	return dma_coerce_mask_and_coherent(&ibdev->dev, DMA_BIT_MASK(64));
}

/*
 * The dma-buf of an MR. It contains a umem because rereg_user_mr reads from the
 * umem whether the MR was registered for writing.
 */
struct rxe_umem_dmabuf {
	struct ib_umem umem;
	struct dma_buf_attachment *attach;
	struct sg_table *sgt;
};

/*
 * Whether the devices that use the buffer see the CPU's caches. rxe's copies
 * keep the caches of the CPU and nothing writes them back for another device.
 */
static bool rxe_dmabuf_is_coherent(struct dma_buf *dmabuf)
{
	struct dma_buf_attachment *attach;
	bool coherent = true;

	dma_resv_lock(dmabuf->resv, NULL);
	list_for_each_entry(attach, &dmabuf->attachments, node)
		if (get_dma_ops(attach->dev) != &rxe_dma_map_ops &&
		    !dev_is_dma_coherent(attach->dev))
			coherent = false;
	dma_resv_unlock(dmabuf->resv);

	return coherent;
}

/*
 * Attach to the dma-buf and map it.
 *
 * ib_umem_dmabuf_get_pinned() of the core attaches as a dynamic importer that
 * allows peer-to-peer, so the exporter may leave the buffer in device memory. A
 * static attachment makes it move the buffer to memory that the CPU can access,
 * and keeps it there.
 */
static struct rxe_umem_dmabuf *rxe_umem_dmabuf_get(struct ib_device *ibdev,
						   u64 offset, u64 length,
						   u64 iova, int fd, int access)
{
	struct rxe_umem_dmabuf *umem_dmabuf;
	struct dma_buf *dmabuf;
	u64 end;
	int err;

	/* Check the fd first: applications probe for the verb with fd -1. */
	dmabuf = dma_buf_get(fd);
	if (IS_ERR(dmabuf))
		return ERR_CAST(dmabuf);

	if (!length || check_add_overflow(iova, length, &end) ||
	    check_add_overflow(offset, length, &end) || end > dmabuf->size) {
		err = -EINVAL;
		goto err_put;
	}

	if (!rxe_dmabuf_is_coherent(dmabuf)) {
		err = -EOPNOTSUPP;
		goto err_put;
	}

	umem_dmabuf = kzalloc(sizeof(*umem_dmabuf), GFP_KERNEL_ACCOUNT);
	if (!umem_dmabuf) {
		err = -ENOMEM;
		goto err_put;
	}

	umem_dmabuf->umem.ibdev = ibdev;
	umem_dmabuf->umem.address = offset;
	umem_dmabuf->umem.length = length;
	umem_dmabuf->umem.writable = ib_access_writable(access);

	umem_dmabuf->attach = dma_buf_attach(dmabuf, &ibdev->dev);
	if (IS_ERR(umem_dmabuf->attach)) {
		err = PTR_ERR(umem_dmabuf->attach);
		goto err_free;
	}

	/*
	 * This also waits until the exporter has moved the buffer. There is no
	 * dma_buf_begin_cpu_access() for an MR, see README.md.
	 */
	umem_dmabuf->sgt = dma_buf_map_attachment_unlocked(umem_dmabuf->attach,
							   DMA_BIDIRECTIONAL);
	if (IS_ERR(umem_dmabuf->sgt)) {
		err = PTR_ERR(umem_dmabuf->sgt);
		goto err_detach;
	}

	return umem_dmabuf;

err_detach:
	dma_buf_detach(dmabuf, umem_dmabuf->attach);
err_free:
	kfree(umem_dmabuf);
err_put:
	dma_buf_put(dmabuf);
	return ERR_PTR(err);
}

static void rxe_umem_dmabuf_release(struct rxe_umem_dmabuf *umem_dmabuf)
{
	struct dma_buf *dmabuf = umem_dmabuf->attach->dmabuf;

	dma_buf_unmap_attachment_unlocked(umem_dmabuf->attach, umem_dmabuf->sgt,
					  DMA_BIDIRECTIONAL);
	dma_buf_detach(dmabuf, umem_dmabuf->attach);
	dma_buf_put(dmabuf);
	kfree(umem_dmabuf);
}

/*
 * Release the umem of any MR. rxe_mr_cleanup() calls this after the last packet
 * has released the MR, in a context that may sleep.
 */
void rxe_mr_release_umem(struct rxe_mr *mr)
{
	if (mr->umem_is_dmabuf)
		rxe_umem_dmabuf_release(container_of(mr->umem,
						     struct rxe_umem_dmabuf,
						     umem));
	else
		ib_umem_release(mr->umem);
}

/*
 * Check the access flags of a re-registration. The pages of a dma-buf are not
 * persistent memory, and never paged on demand. rxe itself checks since 6.12.117
 * that a region for reading does not become writable.
 */
int rxe_mr_check_rereg(struct rxe_mr *mr, int flags, int access)
{
	const int possible = IB_ACCESS_LOCAL_WRITE | IB_ACCESS_REMOTE_READ |
			     IB_ACCESS_REMOTE_WRITE | IB_ACCESS_REMOTE_ATOMIC |
			     IB_ACCESS_MW_BIND | IB_ACCESS_FLUSH_GLOBAL |
			     IB_ACCESS_RELAXED_ORDERING;

	if (!mr->umem_is_dmabuf || !(flags & IB_MR_REREG_ACCESS))
		return 0;
	if (access & ~possible)
		return -EOPNOTSUPP;
	if (ib_access_writable(access) && !mr->umem->writable)
		return -EACCES;

	return 0;
}

/*
 * The memory cgroup of the process pays for the list of pages: an MR of a small
 * part of its memory limit may have a list of any length. When the cgroup is
 * full, fail instead of calling the OOM killer.
 */
#define RXE_DMABUF_GFP (GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN)

#ifdef RXE_HAVE_PAGE_INFO
static int rxe_dmabuf_init_pages(struct rxe_mr *mr, unsigned long count)
{
	/* Too large for kmalloc() for a huge buffer: 1 GiB needs 4 MiB. */
	mr->page_info = kvcalloc(count, sizeof(*mr->page_info), RXE_DMABUF_GFP);
	if (!mr->page_info)
		return -ENOMEM;

	mr->num_buf = count;
	mr->max_allowed_buf = count;

	return 0;
}

static int rxe_dmabuf_add_page(struct rxe_mr *mr, struct page *page)
{
	mr->page_info[mr->nbuf++].page = page;

	return 0;
}
#else
static int rxe_dmabuf_init_pages(struct rxe_mr *mr, unsigned long count)
{
	xa_init_flags(&mr->page_list, XA_FLAGS_ACCOUNT);

	return 0;
}

static int rxe_dmabuf_add_page(struct rxe_mr *mr, struct page *page)
{
	return xa_err(xa_store(&mr->page_list, mr->nbuf++, page,
			       RXE_DMABUF_GFP));
}
#endif

/*
 * Enter the pages of the range offset .. offset + length.
 *
 * sg->offset may exceed a page: udmabuf describes page n of a huge folio as the
 * folio's head page plus an offset of n pages. The sg_page_iter functions count
 * such an entry as n + 1 pages, so walk by pfn.
 */
static int rxe_dmabuf_fill_pages(struct rxe_mr *mr, struct sg_table *sgt,
				 u64 offset, u64 length)
{
	unsigned long skip = PFN_DOWN(offset);
	unsigned long left = PFN_DOWN(offset + length - 1) - skip + 1;
	struct scatterlist *sg;
	unsigned int i;
	int err;

	err = rxe_dmabuf_init_pages(mr, left);
	if (err)
		return err;

	for_each_sgtable_sg(sgt, sg, i) {
		unsigned long n = PFN_DOWN(sg->length);
		struct page *page = sg_page(sg);
		unsigned long pfn;

		if (!PAGE_ALIGNED(sg->offset | sg->length))
			return -EOPNOTSUPP;

		if (skip >= n) {
			skip -= n;
			continue;
		}

		/* Never copy through a PCI BAR, even with struct pages. */
		if (!page || is_pci_p2pdma_page(page))
			return -EOPNOTSUPP;

		pfn = page_to_pfn(page) + PFN_DOWN(sg->offset) + skip;
		n = min(n - skip, left);
		skip = 0;
		left -= n;

		while (n--) {
			err = rxe_dmabuf_add_page(mr, pfn_to_page(pfn++));
			if (err)
				return err;
		}

		if (!left)
			return 0;
	}

	/* The exporter mapped less than the size of the buffer. */
	return -EINVAL;
}

struct ib_mr *rxe_reg_user_mr_dmabuf(struct ib_pd *ibpd, u64 offset,
				     u64 length, u64 iova, int fd, int access,
				     RXE_DMAH_PARAM
				     struct uverbs_attr_bundle *attrs)
{
	struct rxe_dev *rxe = to_rdev(ibpd->device);
	struct rxe_pd *pd = to_rpd(ibpd);
	struct rxe_umem_dmabuf *umem_dmabuf;
	struct rxe_mr *mr;
	int err;

#ifdef RXE_HAVE_DMAH
	if (dmah)
		return ERR_PTR(-EOPNOTSUPP);
#endif

	umem_dmabuf = rxe_umem_dmabuf_get(ibpd->device, offset, length, iova,
					  fd, access);
	if (IS_ERR(umem_dmabuf))
		return ERR_CAST(umem_dmabuf);

	mr = kzalloc(sizeof(*mr), GFP_KERNEL);
	if (!mr) {
		err = -ENOMEM;
		goto err_release;
	}

	err = rxe_add_to_pool(&rxe->mr_pool, mr);
	if (err)
		goto err_free;

	/* From here rxe_mr_cleanup() puts the PD and releases the umem. */
	rxe_get(pd);
	mr->ibmr.pd = ibpd;
	mr->ibmr.device = ibpd->device;
	mr->umem = &umem_dmabuf->umem;
	mr->umem_is_dmabuf = true;

	rxe_mr_init(access, mr);

	err = rxe_dmabuf_fill_pages(mr, umem_dmabuf->sgt, offset, length);
	if (err)
		goto err_cleanup;

	/* uverbs sets these two for reg_user_mr only. */
	mr->ibmr.iova = iova;
	mr->ibmr.length = length;
	mr->ibmr.type = IB_MR_TYPE_USER;
	mr->state = RXE_MR_STATE_VALID;
	rxe_finalize(mr);

	return &mr->ibmr;

err_cleanup:
	rxe_dbg_mr(mr, "pages not usable, err = %d\n", err);
	rxe_cleanup(mr);
	kfree(mr);
	return ERR_PTR(err);

err_free:
	kfree(mr);
err_release:
	rxe_umem_dmabuf_release(umem_dmabuf);
	return ERR_PTR(err);
}
