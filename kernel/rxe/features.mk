
# What this kernel has, for rxe_dmabuf.c. grep instead of comparing versions:
# distributions and stable releases backport changes.
dmabuf_has = $(shell grep -q '$(1)' $(2) && echo y)
dmabuf_verbs := $(srctree)/include/rdma/ib_verbs.h

ifeq ($(call dmabuf_has,reg_user_mr_dmabuf,$(dmabuf_verbs)),)
$(error this kernel's RDMA core cannot import dma-bufs (no reg_user_mr_dmabuf in ib_verbs.h))
endif
ifneq ($(CONFIG_DMABUF_DEBUG),)
$(error this kernel hides the struct pages that rxe needs (CONFIG_DMABUF_DEBUG))
endif
# CONFIG_DMA_OPS up to 6.11.
ifeq ($(CONFIG_ARCH_HAS_DMA_OPS)$(CONFIG_DMA_OPS),)
$(error this kernel may bounce mappings for rxe (no CONFIG_ARCH_HAS_DMA_OPS))
endif
ifneq ($(call dmabuf_has,struct ib_dmah \*dmah,$(dmabuf_verbs)),)
ccflags-y += -DRXE_HAVE_DMAH
endif
ifneq ($(call dmabuf_has,(\*map_phys),$(srctree)/include/linux/dma-map-ops.h),)
ccflags-y += -DRXE_HAVE_MAP_PHYS
endif
# The pages of an MR are in an xarray up to 6.19, and in an array after a fix.
ifneq ($(call dmabuf_has,page_info;,$(src)/rxe_verbs.h),)
ccflags-y += -DRXE_HAVE_PAGE_INFO
endif

rdma_rxe-y += rxe_dmabuf.o
