// SPDX-License-Identifier: GPL-2.0
/*
 * The devices for which the module maps a buffer: PCI devices, RDMA devices,
 * and a device of the module itself whose addresses are physical addresses.
 */

#include <linux/dma-map-ops.h>
#include <linux/err.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/platform_device.h>
#include <linux/scatterlist.h>
#include <linux/string.h>
#include <linux/swiotlb.h>
#if IS_ENABLED(CONFIG_INFINIBAND)
#include <rdma/ib_verbs.h>
#endif

#include "dma_sg.h"
#include "internal.h"

/* For DMA_SG_DEVICE_NONE and for RDMA devices without a dma_device. */
static struct platform_device *dma_sg_identity;

/*
 * Identity DMA mapping for that device. The default operations bounce with
 * swiotlb=force or memory encryption.
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

int dma_sg_identity_register(void)
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
		platform_device_unregister(dma_sg_identity);

	return err;
}

void dma_sg_identity_unregister(void)
{
	platform_device_unregister(dma_sg_identity);
}

/* Whether a device is the module's own, which never goes away. */
bool dma_sg_is_identity(struct device *dev)
{
	return dev == &dma_sg_identity->dev;
}

/*
 * Check that a mapping for this device has meaningful addresses and does not
 * change the buffer. The caller holds the device lock, so the answer stays valid
 * until it has registered the notifier. The module's own device never changes.
 */
int dma_sg_check_device(struct device *dev)
{
	/* The module's own operations neither bounce nor touch caches. */
	if (dma_sg_is_identity(dev))
		return get_dma_ops(dev) == &dma_sg_identity_ops ?
			       0 : -EADDRNOTAVAIL;

	/* The driver sets up the DMA mask and DMA operations. */
	if (!dev->driver)
		return -ENXIO;

	/* The device is in an IOMMU domain of its user, such as a VM. */
	if (dev_is_pci(dev) && to_pci_driver(dev->driver)->driver_managed_dma)
		return -EBUSY;

	/*
	 * A bounced mapping has the addresses of bounce buffers, and unmapping
	 * copies them over data written to the buffer in the meantime.
	 */
	if (is_swiotlb_force_bounce(dev) || dma_addressing_limited(dev))
		return -EADDRNOTAVAIL;

	/* Mapping and unmapping would discard what caches hold of the buffer. */
	if (!dev_is_dma_coherent(dev))
		return -EOPNOTSUPP;

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

	/* sscanf() accepts more than PCI addresses. */
	if (strcmp(name, pci_name(pdev))) {
		pci_dev_put(pdev);
		return ERR_PTR(-EINVAL);
	}

	return &pdev->dev;
}

#if IS_ENABLED(CONFIG_INFINIBAND)
/*
 * Find an RDMA device by name, one search at a time. Later kernels have no
 * lookup by name, but on every kernel the RDMA core calls a new client for each
 * device.
 */
static DEFINE_MUTEX(dma_sg_search_lock);
static const char *dma_sg_search_name;
static struct device *dma_sg_search_found;

static int dma_sg_search_add(struct ib_device *ibdev)
{
	/* Devices without a dma_device copy with the CPU: rxe, siw. */
	if (!strcmp(dev_name(&ibdev->dev), dma_sg_search_name))
		dma_sg_search_found = get_device(ibdev->dma_device ?:
						 &dma_sg_identity->dev);

	/* Decline: a client would keep the device from going away. */
	return -EOPNOTSUPP;
}

static struct ib_client dma_sg_search = {
	.name = "dma_sg",
	.add = dma_sg_search_add,
	.no_kverbs_req = 1,
};

static struct device *dma_sg_find_rdma(const char *name)
{
	struct device *dev;
	int err;

	mutex_lock(&dma_sg_search_lock);
	dma_sg_search_name = name;
	dma_sg_search_found = NULL;
	err = ib_register_client(&dma_sg_search);
	if (!err)
		ib_unregister_client(&dma_sg_search);
	dev = dma_sg_search_found;
	mutex_unlock(&dma_sg_search_lock);

	if (err) {
		put_device(dev);
		return ERR_PTR(err);
	}

	return dev ?: ERR_PTR(-ENODEV);
}
#else
static struct device *dma_sg_find_rdma(const char *name)
{
	return ERR_PTR(-ENODEV);
}
#endif

struct device *dma_sg_find_device(u32 kind, const char *name)
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
