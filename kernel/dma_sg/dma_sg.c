// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/dma_sg: what a device would be told about where a dma-buf is.
 *
 * A dma-buf has no addresses of its own. It gets some when it is mapped for a
 * device, and only drivers see them. This module maps a buffer for a device as
 * that device's driver would, keeps the mapping as long as a descriptor is
 * open, and lets its holder read the addresses. It moves no data.
 */

#include <linux/anon_inodes.h>
#include <linux/dma-buf.h>
#include <linux/dma-map-ops.h>
#include <linux/dma-resv.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/platform_device.h>
#include <linux/poll.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/swiotlb.h>
#include <linux/vmalloc.h>
#if IS_ENABLED(CONFIG_INFINIBAND)
#include <rdma/ib_verbs.h>
#endif

#include "dma_sg.h"

/*
 * A buffer mapped for a device.
 *
 * The mapping ends with the last reference to the descriptor, when the exporter
 * takes the memory away, or when the device loses its driver, whichever is
 * first. @attach, @sgt and @pinned are protected by the buffer's reservation
 * lock; the list does not change once the descriptor exists.
 */
struct dma_sg_view {
	struct device *dev;
	struct notifier_block bus_nb;
	struct dma_buf *dmabuf;
	struct dma_buf_attachment *attach;
	struct sg_table *sgt;
	bool pinned;

	bool ended;
	wait_queue_head_t wait;

	struct dma_sg_entry *entries;
	u64 count;
	u64 bytes;
};

/* The device for those that have none, and for RDMA devices without one. */
static struct platform_device *dma_sg_identity;

/*
 * DMA mapping for that device: the identity. The default operations would be
 * the identity too, until somebody boots with swiotlb=force or encrypts memory.
 */
#ifdef DMA_SG_HAVE_MAP_PHYS
static dma_addr_t dma_sg_map_phys(struct device *dev, phys_addr_t phys,
				  size_t size, enum dma_data_direction dir,
				  unsigned long attrs)
{
	return phys;
}
#else
static dma_addr_t dma_sg_map_page(struct device *dev, struct page *page,
				  unsigned long offset, size_t size,
				  enum dma_data_direction dir,
				  unsigned long attrs)
{
	return page_to_phys(page) + offset;
}

static dma_addr_t dma_sg_map_resource(struct device *dev, phys_addr_t phys,
				      size_t size, enum dma_data_direction dir,
				      unsigned long attrs)
{
	return phys;
}
#endif

static void dma_sg_unmap_one(struct device *dev, dma_addr_t addr, size_t size,
			     enum dma_data_direction dir, unsigned long attrs)
{
}

static int dma_sg_map_sg(struct device *dev, struct scatterlist *sgl, int nents,
			 enum dma_data_direction dir, unsigned long attrs)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(sgl, sg, nents, i) {
		sg_dma_address(sg) = sg_phys(sg);
		sg_dma_len(sg) = sg->length;
	}

	return nents;
}

static void dma_sg_unmap_sg(struct device *dev, struct scatterlist *sgl,
			    int nents, enum dma_data_direction dir,
			    unsigned long attrs)
{
}

static const struct dma_map_ops dma_sg_identity_ops = {
#ifdef DMA_SG_HAVE_MAP_PHYS
	.map_phys = dma_sg_map_phys,
	.unmap_phys = dma_sg_unmap_one,
#else
	.map_page = dma_sg_map_page,
	.unmap_page = dma_sg_unmap_one,
	.map_resource = dma_sg_map_resource,
	.unmap_resource = dma_sg_unmap_one,
#endif
	.map_sg = dma_sg_map_sg,
	.unmap_sg = dma_sg_unmap_sg,
};

/*
 * The end of a mapping whose buffer is locked. The addresses are untrue from
 * here on, so readers are told first.
 */
static void dma_sg_unmap(struct dma_sg_view *view)
{
	dma_resv_assert_held(view->dmabuf->resv);

	if (!view->sgt)
		return;

	WRITE_ONCE(view->ended, true);
	dma_buf_unmap_attachment(view->attach, view->sgt, DMA_BIDIRECTIONAL);
	view->sgt = NULL;
	if (view->pinned)
		dma_buf_unpin(view->attach);
	view->pinned = false;
	wake_up_all(&view->wait);
}

/*
 * The end of an attachment. An exporter that does not move its buffers is
 * mapped as long as something is attached, so this is what really unmaps.
 */
static void dma_sg_detach(struct dma_sg_view *view)
{
	struct dma_buf_attachment *attach;

	dma_resv_lock(view->dmabuf->resv, NULL);
	dma_sg_unmap(view);
	attach = view->attach;
	view->attach = NULL;
	dma_resv_unlock(view->dmabuf->resv);

	if (attach)
		dma_buf_detach(view->dmabuf, attach);
}

/* The exporter moves or revokes the buffer and holds its lock. */
static void dma_sg_invalidate(struct dma_buf_attachment *attach)
{
	dma_sg_unmap(attach->importer_priv);
}

static const struct dma_buf_attach_ops dma_sg_attach_ops = {
	.allow_peer2peer = true,
#ifdef DMA_SG_HAVE_INVALIDATE_MAPPINGS
	.invalidate_mappings = dma_sg_invalidate,
#else
	.move_notify = dma_sg_invalidate,
#endif
};

/*
 * The device gets or loses a driver, or goes: its DMA set-up (masks, IOMMU
 * domain) is not what the buffer was mapped with any more, and after the
 * removal there would be nothing left to unmap it from.
 */
static int dma_sg_bus_event(struct notifier_block *nb, unsigned long event,
			    void *data)
{
	struct dma_sg_view *view = container_of(nb, struct dma_sg_view, bus_nb);

	if (data != view->dev)
		return NOTIFY_DONE;

	switch (event) {
	case BUS_NOTIFY_BIND_DRIVER:
	case BUS_NOTIFY_UNBIND_DRIVER:
	case BUS_NOTIFY_DEL_DEVICE:
		dma_sg_detach(view);
		return NOTIFY_OK;
	}

	return NOTIFY_DONE;
}

/* Make room for twice as many entries as there are. */
static int dma_sg_grow(struct dma_sg_view *view, u64 *room)
{
	u64 more = max(2 * *room, PAGE_SIZE / sizeof(*view->entries));
	struct dma_sg_entry *entries;

	entries = __vmalloc_array(more, sizeof(*entries),
				  GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	if (!entries)
		return -ENOMEM;

	if (view->count)
		memcpy(entries, view->entries, view->count * sizeof(*entries));
	vfree(view->entries);
	view->entries = entries;
	*room = more;

	return 0;
}

/*
 * Take down the list. Neighbours become one entry: an sg entry ends where 32
 * bits do, a run of memory may not. That often leaves a thousandth of a long
 * list, so it is walked once and room is made on the way.
 */
static int dma_sg_flatten(struct dma_sg_view *view, struct sg_table *sgt)
{
	u64 room = 0, begin = 0, end = 0;
	struct scatterlist *sg;
	unsigned int i;
	int err;

	for_each_sgtable_dma_sg(sgt, sg, i) {
		u64 addr = sg_dma_address(sg);
		u64 len = sg_dma_len(sg);

		if (!len)
			continue;

		if (addr != end || !view->count) {
			if (view->count)
				view->entries[view->count - 1].len = end - begin;
			if (view->count == room) {
				err = dma_sg_grow(view, &room);
				if (err)
					return err;
			}
			view->entries[view->count++].addr = addr;
			begin = addr;
		}
		end = addr + len;
		view->bytes += len;
	}

	if (view->count)
		view->entries[view->count - 1].len = end - begin;

	return 0;
}

/* Map an attached buffer and take down its list. The buffer is locked. */
static int dma_sg_map_locked(struct dma_sg_view *view)
{
	struct sg_table *sgt;
	int err;

	/*
	 * An exporter that cannot pin may still map, for importers that let go
	 * when they are told to, as this one does.
	 */
	err = dma_buf_pin(view->attach);
	if (err && err != -EOPNOTSUPP)
		return err;
	view->pinned = !err;

	sgt = dma_buf_map_attachment(view->attach, DMA_BIDIRECTIONAL);
	if (IS_ERR(sgt)) {
		err = PTR_ERR(sgt);
		goto err_unpin;
	}

	err = dma_sg_flatten(view, sgt);
	if (err)
		goto err_unmap;
	view->sgt = sgt;

	return 0;

err_unmap:
	dma_buf_unmap_attachment(view->attach, sgt, DMA_BIDIRECTIONAL);
err_unpin:
	if (view->pinned)
		dma_buf_unpin(view->attach);
	view->pinned = false;
	return err;
}

/*
 * Whether a mapping made for this device now would mean anything. The caller
 * holds the device's lock, so that it stays true until the notifier is there.
 */
static int dma_sg_check_device(struct device *dev)
{
	/* Masks and DMA operations are set up by and for a driver. */
	if (!dev->driver)
		return -ENXIO;

	/* The device is in somebody else's IOMMU domain: a VM's, for one. */
	if (dev_is_pci(dev) && to_pci_driver(dev->driver)->driver_managed_dma)
		return -EBUSY;

	/*
	 * A bounced mapping names bounce buffers, and ending it would copy them
	 * over what has been written to the buffer in the meantime.
	 */
	if (is_swiotlb_force_bounce(dev) || dma_addressing_limited(dev))
		return -EADDRNOTAVAIL;

	return 0;
}

static struct device *dma_sg_find_pci(const char *name)
{
	unsigned int domain, bus, slot, func;
	struct pci_dev *pdev;

	if (sscanf(name, "%x:%x:%x.%x", &domain, &bus, &slot, &func) != 4 ||
	    bus > 0xff || slot > 0x1f || func > 7)
		return ERR_PTR(-EINVAL);

	pdev = pci_get_domain_bus_and_slot(domain, bus, PCI_DEVFN(slot, func));
	if (!pdev)
		return ERR_PTR(-ENODEV);

	/* sscanf() is content with more than addresses. */
	if (strcmp(name, pci_name(pdev))) {
		pci_dev_put(pdev);
		return ERR_PTR(-EINVAL);
	}

	return &pdev->dev;
}

static struct device *dma_sg_find_rdma(const char *name)
{
#if IS_ENABLED(CONFIG_INFINIBAND)
	struct ib_device *ibdev;
	struct device *dev;

	ibdev = ib_device_get_by_name(name, RDMA_DRIVER_UNKNOWN);
	if (!ibdev)
		return ERR_PTR(-ENODEV);

	/* Without a dma_device the CPU does the copying: rxe, siw. */
	dev = get_device(ibdev->dma_device ?: &dma_sg_identity->dev);
	/* Kept, this reference would keep the RDMA device from going. */
	ib_device_put(ibdev);

	return dev;
#else
	return ERR_PTR(-ENODEV);
#endif
}

static struct device *dma_sg_find_device(u32 kind, const char *name)
{
	switch (kind) {
	case DMA_SG_DEVICE_NONE:
		return *name ? ERR_PTR(-EINVAL) :
			       get_device(&dma_sg_identity->dev);
	case DMA_SG_DEVICE_PCI:
		return dma_sg_find_pci(name);
	case DMA_SG_DEVICE_RDMA:
		return dma_sg_find_rdma(name);
	}

	return ERR_PTR(-EINVAL);
}

static int dma_sg_attach(struct dma_sg_view *view)
{
	int err;

	view->attach = dma_buf_dynamic_attach(view->dmabuf, view->dev,
					      &dma_sg_attach_ops, view);
	if (IS_ERR(view->attach)) {
		err = PTR_ERR(view->attach);
		view->attach = NULL;
		return err;
	}

	dma_resv_lock(view->dmabuf->resv, NULL);
	err = dma_sg_map_locked(view);
	dma_resv_unlock(view->dmabuf->resv);
	if (err)
		dma_sg_detach(view);

	return err;
}

/* Attach for a device that may go away. */
static int dma_sg_attach_watched(struct dma_sg_view *view)
{
	int err;

	device_lock(view->dev);

	err = dma_sg_check_device(view->dev);
	if (err)
		goto out;

	err = dma_sg_attach(view);
	if (err)
		goto out;

	view->bus_nb.notifier_call = dma_sg_bus_event;
	err = bus_register_notifier(view->dev->bus, &view->bus_nb);
	if (err) {
		view->bus_nb.notifier_call = NULL;
		dma_sg_detach(view);
	}

out:
	device_unlock(view->dev);
	return err;
}

/* Takes over the reference to @dmabuf, also when it fails. */
static struct dma_sg_view *dma_sg_create(struct dma_buf *dmabuf, u32 kind,
					 const char *name)
{
	struct dma_sg_view *view;
	int err;

	view = kzalloc(sizeof(*view), GFP_KERNEL_ACCOUNT);
	if (!view) {
		err = -ENOMEM;
		goto err_put;
	}

	init_waitqueue_head(&view->wait);
	view->dmabuf = dmabuf;
	view->dev = dma_sg_find_device(kind, name);
	if (IS_ERR(view->dev)) {
		err = PTR_ERR(view->dev);
		goto err_free;
	}

	if (view->dev == &dma_sg_identity->dev)
		err = dma_sg_attach(view);
	else
		err = dma_sg_attach_watched(view);
	if (err)
		goto err_device;

	return view;

err_device:
	put_device(view->dev);
	vfree(view->entries);
err_free:
	kfree(view);
err_put:
	dma_buf_put(dmabuf);
	return ERR_PTR(err);
}

static void dma_sg_destroy(struct dma_sg_view *view)
{
	/* Also waits for an event that is being handled. */
	if (view->bus_nb.notifier_call)
		bus_unregister_notifier(view->dev->bus, &view->bus_nb);

	dma_sg_detach(view);
	put_device(view->dev);
	dma_buf_put(view->dmabuf);
	vfree(view->entries);
	kfree(view);
}

static int dma_sg_view_release(struct inode *inode, struct file *file)
{
	dma_sg_destroy(file->private_data);
	return 0;
}

static long dma_sg_read(struct dma_sg_view *view, void __user *arg)
{
	struct dma_sg_read read;

	if (copy_from_user(&read, arg, sizeof(read)))
		return -EFAULT;

	read.total = view->count;
	if (read.first > view->count)
		return -EINVAL;

	/* copy_to_user() does not take more than INT_MAX bytes. */
	read.count = min3(read.count, view->count - read.first,
			  (u64)INT_MAX / sizeof(*view->entries));
	if (read.count && copy_to_user(u64_to_user_ptr(read.entries),
				       view->entries + read.first,
				       read.count * sizeof(*view->entries)))
		return -EFAULT;

	/* Asked last: what was copied was true until here. */
	if (READ_ONCE(view->ended))
		return -ESTALE;

	return copy_to_user(arg, &read, sizeof(read)) ? -EFAULT : 0;
}

static long dma_sg_view_ioctl(struct file *file, unsigned int cmd,
			      unsigned long arg)
{
	if (cmd == DMA_SG_IOCTL_READ)
		return dma_sg_read(file->private_data, (void __user *)arg);

	return -ENOTTY;
}

static __poll_t dma_sg_view_poll(struct file *file, poll_table *wait)
{
	struct dma_sg_view *view = file->private_data;

	poll_wait(file, &view->wait, wait);

	return READ_ONCE(view->ended) ? EPOLLIN | EPOLLPRI : 0;
}

static void dma_sg_view_show_fdinfo(struct seq_file *m, struct file *file)
{
	struct dma_sg_view *view = file->private_data;

	seq_printf(m, "dma_sg-device:\t%s\n", dev_name(view->dev));
	seq_printf(m, "dma_sg-entries:\t%llu\n", view->count);
	seq_printf(m, "dma_sg-bytes:\t%llu\n", view->bytes);
	seq_printf(m, "dma_sg-state:\t%s\n", READ_ONCE(view->ended) ? "ended" :
		   READ_ONCE(view->pinned) ? "pinned" : "mapped");
}

static const struct file_operations dma_sg_view_fops = {
	.owner = THIS_MODULE,
	.release = dma_sg_view_release,
	.unlocked_ioctl = dma_sg_view_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.poll = dma_sg_view_poll,
	.show_fdinfo = dma_sg_view_show_fdinfo,
};

static long dma_sg_map(void __user *arg)
{
	struct dma_sg_view *view;
	struct dma_buf *dmabuf;
	struct dma_sg_map map;
	struct file *file;
	int fd;

	if (copy_from_user(&map, arg, sizeof(map)))
		return -EFAULT;
	if (map.flags || map.reserved ||
	    strnlen(map.name, sizeof(map.name)) == sizeof(map.name))
		return -EINVAL;

	dmabuf = dma_buf_get(map.fd);
	if (IS_ERR(dmabuf))
		return PTR_ERR(dmabuf);

	view = dma_sg_create(dmabuf, map.device, map.name);
	if (IS_ERR(view))
		return PTR_ERR(view);

	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0) {
		dma_sg_destroy(view);
		return fd;
	}

	file = anon_inode_getfile("[dma_sg]", &dma_sg_view_fops, view, O_RDONLY);
	if (IS_ERR(file)) {
		put_unused_fd(fd);
		dma_sg_destroy(view);
		return PTR_ERR(file);
	}
	fd_install(fd, file);

	return fd;
}

/* Physical addresses are for the administrator: with them goes Rowhammer. */
static int dma_sg_open(struct inode *inode, struct file *file)
{
	return capable(CAP_SYS_ADMIN) ? 0 : -EPERM;
}

static long dma_sg_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	if (cmd != DMA_SG_IOCTL_MAP)
		return -ENOTTY;

	/* An open descriptor may have been inherited. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;

	return dma_sg_map((void __user *)arg);
}

static const struct file_operations dma_sg_fops = {
	.owner = THIS_MODULE,
	.open = dma_sg_open,
	.unlocked_ioctl = dma_sg_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice dma_sg_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "dma_sg",
	.fops = &dma_sg_fops,
	.mode = 0600,
};

static int __init dma_sg_init(void)
{
	int err;

	dma_sg_identity = platform_device_register_simple("dma_sg-identity",
							  PLATFORM_DEVID_NONE,
							  NULL, 0);
	if (IS_ERR(dma_sg_identity))
		return PTR_ERR(dma_sg_identity);

	set_dma_ops(&dma_sg_identity->dev, &dma_sg_identity_ops);
	dma_set_max_seg_size(&dma_sg_identity->dev, UINT_MAX);
	err = dma_set_mask_and_coherent(&dma_sg_identity->dev,
					DMA_BIT_MASK(64));
	if (err)
		goto err_device;

	err = misc_register(&dma_sg_misc);
	if (err)
		goto err_device;

	return 0;

err_device:
	platform_device_unregister(dma_sg_identity);
	return err;
}

static void __exit dma_sg_exit(void)
{
	misc_deregister(&dma_sg_misc);
	platform_device_unregister(dma_sg_identity);
}

module_init(dma_sg_init);
module_exit(dma_sg_exit);

/* What MODULE_IMPORT_NS() makes of its argument, which 6.13 turned into a string. */
MODULE_INFO(import_ns, "DMA_BUF");
MODULE_DESCRIPTION("A dma-buf's addresses as a device sees them");
MODULE_LICENSE("GPL");
