// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/dma_sg: the addresses of a dma-buf as a device sees them.
 *
 * A dma-buf has no addresses until a driver maps it for a device, and only that
 * driver sees them. This module maps a buffer as the device's driver would,
 * keeps the mapping while a descriptor is open, and lets the holder of the
 * descriptor read the addresses. It moves no data.
 */

#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/uaccess.h>

#include "dma_sg.h"
#include "internal.h"

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

/* Physical addresses help attacks such as Rowhammer. */
static int dma_sg_open(struct inode *inode, struct file *file)
{
	return capable(CAP_SYS_ADMIN) ? 0 : -EPERM;
}

static long dma_sg_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	if (cmd != DMA_SG_IOCTL_MAP)
		return -ENOTTY;

	/* The process may have inherited the open descriptor. */
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

	err = dma_sg_identity_register();
	if (err)
		return err;

	err = misc_register(&dma_sg_misc);
	if (err)
		dma_sg_identity_unregister();

	return err;
}

static void __exit dma_sg_exit(void)
{
	misc_deregister(&dma_sg_misc);
	dma_sg_identity_unregister();
}

module_init(dma_sg_init);
module_exit(dma_sg_exit);

/* The expansion of MODULE_IMPORT_NS(), which takes a string since 6.13. */
MODULE_INFO(import_ns, "DMA_BUF");
MODULE_DESCRIPTION("The addresses of a dma-buf as a device sees them");
MODULE_LICENSE("GPL");
