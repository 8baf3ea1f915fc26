/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/dma_sg: the addresses of a dma-buf as a device sees them.
 *
 * DMA_SG_IOCTL_MAP on the device node returns a descriptor that holds the
 * mapping. DMA_SG_IOCTL_READ on that descriptor copies the list.
 */
#ifndef DMA_SG_UAPI_H
#define DMA_SG_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* The device whose addresses the list has. */
#define DMA_SG_DEVICE_NONE	0	/* none: physical addresses */
#define DMA_SG_DEVICE_PCI	1	/* name: "0000:00:02.0" */
#define DMA_SG_DEVICE_RDMA	2	/* name: "mlx5_0", "rxe0" */

#define DMA_SG_NAME_LEN		64	/* including the NUL */

/**
 * struct dma_sg_map - argument of DMA_SG_IOCTL_MAP
 * @fd: a dma-buf
 * @device: DMA_SG_DEVICE_*
 * @flags: zero
 * @reserved: zero
 * @name: the device's name, NUL-terminated; empty for DMA_SG_DEVICE_NONE
 */
struct dma_sg_map {
	__s32 fd;
	__u32 device;
	__u32 flags;
	__u32 reserved;
	char name[DMA_SG_NAME_LEN];
};

/**
 * struct dma_sg_entry - @len bytes at @addr, in the device's address space
 */
struct dma_sg_entry {
	__u64 addr;
	__u64 len;
};

/**
 * struct dma_sg_read - argument of DMA_SG_IOCTL_READ
 * @first: in: index of the first entry to copy
 * @count: in: maximum number of entries to copy, may be 0; out: entries copied,
 *	fewer at the end of the list or beyond 2 GiB of entries
 * @total: out: number of entries in the list
 * @entries: in: address of an array of @count entries; not used if @count is 0
 */
struct dma_sg_read {
	__u64 first;
	__u64 count;
	__u64 total;
	__u64 entries;
};

/* On /dev/dma_sg. Returns a new descriptor, close-on-exec. */
#define DMA_SG_IOCTL_MAP	_IOW(0xde, 0x00, struct dma_sg_map)
/* On that descriptor. ESTALE after the mapping ended; poll() reports that. */
#define DMA_SG_IOCTL_READ	_IOWR(0xde, 0x01, struct dma_sg_read)

#endif
