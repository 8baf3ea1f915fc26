/* SPDX-License-Identifier: GPL-2.0 */
/* Declarations that the files of this module share. */
#ifndef DMA_SG_INTERNAL_H
#define DMA_SG_INTERNAL_H

#include <linux/device.h>
#include <linux/dma-buf.h>
#include <linux/fs.h>

struct dma_sg_view;

/* device.c: the devices for which the module maps a buffer. */
int dma_sg_identity_register(void);
void dma_sg_identity_unregister(void);
bool dma_sg_is_identity(struct device *dev);
struct device *dma_sg_find_device(u32 kind, const char *name);
int dma_sg_check_device(struct device *dev);

/* view.c: a buffer mapped for a device. */
struct dma_sg_view *dma_sg_create(struct dma_buf *dmabuf, u32 kind,
				  const char *name);
void dma_sg_destroy(struct dma_sg_view *view);
extern const struct file_operations dma_sg_view_fops;

#endif
