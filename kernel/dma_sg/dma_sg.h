/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/dma_sg: a dma-buf's addresses as a device sees them.
 *
 * DMA_SG_IOCTL_MAP on the device node returns a descriptor that holds the
 * mapping; DMA_SG_IOCTL_READ on that descriptor copies the list out.
 */
#ifndef DMA_SG_UAPI_H
#define DMA_SG_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Who the list is for. */
#define DMA_SG_DEVICE_NONE	0	/* a device that addresses physical memory */
#define DMA_SG_DEVICE_PCI	1	/* name: "0000:00:02.0" */
#define DMA_SG_DEVICE_RDMA	2	/* name: "mlx5_0", "rxe0" */

#define DMA_SG_NAME_LEN		64	/* with the NUL */

/**
 * struct dma_sg_map - argument of DMA_SG_IOCTL_MAP
 * @fd: a dma-buf
 * @device: DMA_SG_DEVICE_*
 * @flags: zero
 * @reserved: zero
 * @name: the device's name, ending in NUL; empty for DMA_SG_DEVICE_NONE
 */
struct dma_sg_map {
	__s32 fd;
	__u32 device;
	__u32 flags;
	__u32 reserved;
	char name[DMA_SG_NAME_LEN];
};

/**
 * struct dma_sg_entry - @len bytes from @addr on, in the device's address space
 */
struct dma_sg_entry {
	__u64 addr;
	__u64 len;
};

/**
 * struct dma_sg_read - argument of DMA_SG_IOCTL_READ
 * @first: in: index of the first entry wanted
 * @count: in: how many at most, may be 0; out: how many were copied, fewer than
 *	asked for at the end of the list or beyond 2 GiB of them
 * @total: out: how many the list has
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
/* On that descriptor. ESTALE once the mapping has ended; poll() tells when. */
#define DMA_SG_IOCTL_READ	_IOWR(0xde, 0x01, struct dma_sg_read)

#endif
