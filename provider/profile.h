/* A device to pretend to be: how its provider and driver differ from soft-RoCE. */

#ifndef PROFILE_H
#define PROFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <infiniband/verbs.h>

struct profile {
	const char *name;
	/* Overwrite what the device and its ports report. */
	void (*device)(struct ibv_device_attr *attr);
	void (*port)(struct ibv_port_attr *attr);
	/* 0 or the errno with which the device refuses a request. */
	int (*create_cq)(const struct ibv_comp_channel *channel);
	int (*create_qp)(enum ibv_qp_type type, const struct ibv_qp_cap *cap);
	int (*modify_qp)(const struct ibv_qp_attr *attr, int mask);
	int (*reg_mr)(size_t length, int access);
	/* The errno with which it refuses every dma-buf, once the descriptor is known to be one. */
	int dmabuf_errno;
	/* Registrations of dma-bufs succeed, with keys that name no memory. */
	bool dead_keys;
	/* Registrations of dma-bufs succeed, and name other pages than the buffer's. */
	bool stray_pages;
	/* The errno with which it answers a descriptor that is no dma-buf, such as the -1 of a probe. */
	int probe_errno;
	/* Its packets reach nobody, and it waits for the answer without an end. */
	bool silent;
};

/* The profile of that name; NULL if there is none. */
const struct profile *profile_named(const char *name);

#endif
