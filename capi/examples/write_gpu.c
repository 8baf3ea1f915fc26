/*
 * Writes memory of an NVIDIA GPU to a peer's GPU, by pointer. An AMD or Intel GPU differs only in how it allocates.
 *
 *   write_gpu receive 192.0.2.1:7475
 *   write_gpu send 192.0.2.1:7475
 *
 * The library exports the allocation under a pointer as a dma-buf, registers it once, and finds it again for every other
 * pointer into it. The CUDA driver is loaded at run time, so that this builds without CUDA's headers.
 */
#include <dlfcn.h>
#include <string.h>

#include "example.h"

/* An allocation, and the part of it that is transferred: any bytes, as of a tensor in a pool. */
enum { ALLOCATION = 4 << 20, START = 1000, SIZE = 100000 };

static int (*copy_to_gpu)(uint64_t to, const void *from, size_t size);
static int (*copy_from_gpu)(void *to, uint64_t from, size_t size);
static int (*free_memory)(uint64_t pointer);

static void *function(void *driver, const char *name)
{
	void *found = dlsym(driver, name);

	if (!found) {
		fprintf(stderr, "the driver lacks %s\n", name);
		exit(1);
	}
	return found;
}

static void cuda(int code, const char *what)
{
	if (code) {
		fprintf(stderr, "%s: CUDA's error %d\n", what, code);
		exit(1);
	}
}

/* Memory of the first GPU. */
static uint64_t allocate(void)
{
	void *driver = dlopen("libcuda.so.1", RTLD_NOW), *context;
	int (*init)(unsigned int), (*retain)(void **, int), (*push)(void *), (*get)(int *, int);
	int (*make)(uint64_t *, size_t), device;
	uint64_t pointer;

	if (!driver) {
		fprintf(stderr, "no CUDA driver: %s\n", dlerror());
		exit(1);
	}
	*(void **)&init = function(driver, "cuInit");
	*(void **)&get = function(driver, "cuDeviceGet");
	*(void **)&retain = function(driver, "cuDevicePrimaryCtxRetain");
	*(void **)&push = function(driver, "cuCtxPushCurrent_v2");
	*(void **)&make = function(driver, "cuMemAlloc_v2");
	*(void **)&copy_to_gpu = function(driver, "cuMemcpyHtoD_v2");
	*(void **)&copy_from_gpu = function(driver, "cuMemcpyDtoH_v2");
	*(void **)&free_memory = function(driver, "cuMemFree_v2");
	cuda(init(0), "cannot start CUDA");
	cuda(get(&device, 0), "no GPU");
	cuda(retain(&context, device), "no context");
	cuda(push(context), "no context");
	cuda(make(&pointer, ALLOCATION), "no memory");
	return pointer;
}

static int receive(const char *address)
{
	drdma_options options = { .notifications = 4 };
	unsigned char description[128], *bytes = malloc(SIZE);
	size_t size = sizeof description;
	drdma_connection *connection;
	drdma_incoming *incoming;
	drdma_listener *listener;
	drdma_domain *domain;
	drdma_region *region;
	uint64_t pointer = allocate();
	drdma_notification more;
	char device[64];
	int wrong = 0;

	check(drdma_listen(address, &listener), "cannot listen");
	printf("listening\n");
	fflush(stdout);
	check(drdma_listener_accept(listener, TIMEOUT, &incoming), "nobody connects");
	check(drdma_incoming_device(incoming, device, sizeof device, NULL), "no device");
	check(drdma_domain_open(device, &domain), "cannot open the device");
	check(drdma_register_pointer(domain, pointer + START, SIZE, DRDMA_REMOTE, &region), "cannot register the memory");
	check(drdma_region_describe(region, description, &size), "cannot describe the region");
	check(drdma_incoming_accept(incoming, domain, &options, description, size, TIMEOUT, &connection),
	      "cannot accept");
	check(drdma_notifications_wait(connection, 1, 1, TIMEOUT), "the bytes have not come");
	check(drdma_connection_flush(connection, region), "the GPU may not see the bytes");
	cuda(copy_from_gpu(bytes, pointer + START, SIZE), "cannot copy");
	for (size_t at = 0; at < SIZE && !wrong; at++)
		wrong = bytes[at] != byte(at);
	/* The sender disconnects first: a disconnect could overtake the acknowledgement of its write. */
	drdma_notifications_take(connection, TIMEOUT, &more);
	printf("received %d bytes, %s\n", SIZE, wrong ? "and some are wrong" : "verified");

	/* The domain's cache holds the registration: release it before the memory. */
	drdma_connection_unref(connection);
	drdma_region_unref(region);
	drdma_domain_unref(domain);
	drdma_incoming_unref(incoming);
	drdma_listener_unref(listener);
	cuda(free_memory(pointer), "cannot free");
	free(bytes);
	return wrong;
}

static int send_to(const char *address)
{
	unsigned char reply[256], *bytes = malloc(SIZE);
	size_t size = sizeof reply;
	drdma_connection *connection;
	drdma_transfer *transfer;
	drdma_domain *domain;
	drdma_region *region;
	drdma_remote *remote;
	uint64_t pointer = allocate(), count;

	for (size_t at = 0; at < SIZE; at++)
		bytes[at] = byte(at);
	/* It returns when the bytes are there. Work of your own on the GPU needs a synchronization before the transfer. */
	cuda(copy_to_gpu(pointer + START, bytes, SIZE), "cannot copy");
	check(drdma_domain_open(getenv("RDMA_DEVICE") ? getenv("RDMA_DEVICE") : "rxe0", &domain), "cannot open the device");
	check(drdma_connect(address, domain, NULL, NULL, 0, TIMEOUT, &connection), "cannot connect");
	check(drdma_connection_private_data(connection, reply, &size), "no reply");
	check(drdma_remote_parse(reply, size, &remote), "the reply describes no memory");
	check(drdma_register_pointer(domain, pointer + START, SIZE, 0, &region), "cannot register the memory");
	check(drdma_write_notify(connection, region, remote, 1, -1, &transfer), "cannot start to write");
	check(drdma_transfer_wait(transfer, TIMEOUT, &count), "cannot write");
	printf("wrote %llu bytes\n", (unsigned long long)count);

	drdma_transfer_unref(transfer);
	drdma_remote_unref(remote);
	drdma_region_unref(region);
	drdma_connection_unref(connection);
	drdma_domain_unref(domain);
	cuda(free_memory(pointer), "cannot free");
	free(bytes);
	return 0;
}

int main(int count, char **words)
{
	if (count == 3 && !strcmp(words[1], "receive"))
		return receive(words[2]);
	if (count == 3 && !strcmp(words[1], "send"))
		return send_to(words[2]);
	fprintf(stderr, "usage: %s receive|send HOST:PORT\n", words[0]);
	return 2;
}
