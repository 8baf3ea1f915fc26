// SPDX-License-Identifier: GPL-2.0
/*
 * A buffer mapped for a device: create the view, read it, and end it.
 */

#include <linux/dma-resv.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/poll.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "dma_sg.h"
#include "internal.h"

/*
 * A buffer mapped for a device.
 *
 * The mapping ends when the last reference to the descriptor goes, the exporter
 * takes the memory away, or the device gets or loses a driver. The buffer's
 * reservation lock protects @attach, @sgt and @pinned. The list does not change
 * once the descriptor exists.
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

/*
 * End the mapping. The caller holds the reservation lock. Set @ended first,
 * since the addresses are invalid after the unmap.
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
 * End the attachment. For an exporter that does not move its buffers the
 * mapping is cached until the detach.
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

/* The exporter calls this to move or revoke the buffer, and holds its lock. */
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
 * The device gets or loses a driver, or goes away. Its DMA setup (mask, IOMMU
 * domain) changes, and after the removal the buffer could not be unmapped.
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

/* Double the room for entries. */
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
 * Copy the list and merge adjacent entries: an sg entry is limited to 32 bits,
 * a run of memory is not. Merging often leaves a thousandth of a long list, so
 * grow the copy on the way instead of counting first.
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

/* Map an attached buffer and copy its list. The caller holds the lock. */
static int dma_sg_map_locked(struct dma_sg_view *view)
{
	struct sg_table *sgt;
	int err;

	/*
	 * An exporter that cannot pin may still map for an importer that unmaps
	 * on request, as this one does.
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

/* Attach for a device that may go away, and watch it. */
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

/* Takes the reference to @dmabuf, also on failure. */
struct dma_sg_view *dma_sg_create(struct dma_buf *dmabuf, u32 kind,
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

	if (dma_sg_is_identity(view->dev))
		err = dma_sg_check_device(view->dev) ?: dma_sg_attach(view);
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

void dma_sg_destroy(struct dma_sg_view *view)
{
	/* This also waits for a running event handler. */
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

	/* copy_to_user() copies at most INT_MAX bytes. */
	read.count = min3(read.count, view->count - read.first,
			  (u64)INT_MAX / sizeof(*view->entries));
	if (read.count && copy_to_user(u64_to_user_ptr(read.entries),
				       view->entries + read.first,
				       read.count * sizeof(*view->entries)))
		return -EFAULT;

	/* Check last: if not ended, the copied entries are still valid here. */
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

const struct file_operations dma_sg_view_fops = {
	.owner = THIS_MODULE,
	.release = dma_sg_view_release,
	.unlocked_ioctl = dma_sg_view_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.poll = dma_sg_view_poll,
	.show_fdinfo = dma_sg_view_show_fdinfo,
};
