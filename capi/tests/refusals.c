/* Every function with handles that are NULL, released, of another type or no handles at all, and with NULL for every pointer. */
#include <errno.h>
#include <pthread.h>

#include "harness.h"

/* One handle of each type. */
struct handles {
	drdma_domain *domain;
	drdma_region *region;
	drdma_remote *remote;
	drdma_blocks *local_blocks, *remote_blocks;
	drdma_connection *connection;
	drdma_transfer *transfer;
	drdma_listener *listener;
	drdma_incoming *incoming;
	drdma_queue_pair *queue_pair;
};

static unsigned char memory[4096], bytes[512];
static char peer[40];

/* Somebody who wants to connect, and is rejected. */
static void *call(void *unused)
{
	drdma_connection *connection;

	REFUSED(drdma_connect(peer, NULL, NULL, NULL, 0, 30000, &connection), DRDMA_PEER_GONE, "rejected");
	return unused;
}

/* A handle of each type, but for the queue pair: foreign.c has one. */
static struct handles make(pthread_t *caller)
{
	struct handles all;

	OK(drdma_domain_open("rxe0", &all.domain));
	OK(drdma_register_host(all.domain, memory, sizeof memory, DRDMA_REMOTE, NULL, NULL, &all.region));
	all.remote = described(all.region);
	OK(drdma_region_strided(all.region, 8, 8, 4, &all.local_blocks));
	OK(drdma_remote_strided(all.remote, 8, 8, 4, &all.remote_blocks));
	OK(drdma_connection_new(all.domain, NULL, &all.connection));
	/* To itself. */
	OK(drdma_connection_endpoint(all.connection, bytes));
	OK(drdma_connection_connect(all.connection, bytes));
	OK(drdma_write(all.connection, all.region, all.remote, 30000, &all.transfer));
	OK(drdma_transfer_wait(all.transfer, 30000, NULL));
	OK(drdma_listen("192.168.77.1:0", &all.listener));
	snprintf(peer, sizeof peer, "192.168.77.1:%d", drdma_listener_port(all.listener));
	CHECK(!pthread_create(caller, NULL, call, NULL));
	OK(drdma_listener_accept(all.listener, 30000, &all.incoming));
	all.queue_pair = NULL;
	return all;
}

static void release(struct handles all, pthread_t caller)
{
	OK(drdma_incoming_unref(all.incoming));
	CHECK(!pthread_join(caller, NULL));
	OK(drdma_listener_unref(all.listener));
	OK(drdma_transfer_unref(all.transfer));
	OK(drdma_connection_unref(all.connection));
	OK(drdma_blocks_unref(all.local_blocks));
	OK(drdma_blocks_unref(all.remote_blocks));
	OK(drdma_remote_unref(all.remote));
	OK(drdma_region_unref(all.region));
	OK(drdma_domain_unref(all.domain));
}

/* Each argument that is a handle, in turn, is a bad one among good ones. */
static void refused(struct handles bad, struct handles good, const char *words)
{
	size_t size = sizeof bytes;
	uint64_t number = 0;
	int64_t next;
	char text[40];
	drdma_region *region;
	drdma_remote *remote;
	drdma_blocks *blocks;
	drdma_connection *connection;
	drdma_transfer *transfer;
	drdma_incoming *incoming;
	drdma_notification told;

	MISUSE(drdma_domain_ref(bad.domain), words);
	MISUSE(drdma_register_dmabuf(bad.domain, 0, 0, 0, 0, &region), words);
	MISUSE(drdma_register_host(bad.domain, memory, 64, 0, NULL, NULL, &region), words);
	MISUSE(drdma_register_pointer(bad.domain, 4096, 1, 0, &region), words);

	MISUSE(drdma_region_ref(bad.region), words);
	MISUSE(drdma_region_slice(bad.region, 0, 1, &region), words);
	CHECK(drdma_region_length(bad.region) == 0 && says(words));
	MISUSE(drdma_region_element(bad.region, (struct ibv_sge *)bytes), words);
	MISUSE(drdma_region_describe(bad.region, bytes, &size), words);
	MISUSE(drdma_region_strided(bad.region, 1, 1, 1, &blocks), words);
	MISUSE(drdma_region_blocks(bad.region, 1, &number, 1, &blocks), words);

	MISUSE(drdma_remote_ref(bad.remote), words);
	MISUSE(drdma_remote_slice(bad.remote, 0, 1, &remote), words);
	CHECK(drdma_remote_length(bad.remote) == 0 && says(words));
	MISUSE(drdma_remote_strided(bad.remote, 1, 1, 1, &blocks), words);
	MISUSE(drdma_remote_blocks(bad.remote, 1, &number, 1, &blocks), words);

	MISUSE(drdma_blocks_ref(bad.local_blocks), words);
	MISUSE(drdma_blocks_select(bad.local_blocks, &number, 1, &blocks), words);
	CHECK(drdma_blocks_count(bad.local_blocks) == 0 && says(words));

	MISUSE(drdma_connection_new(bad.domain, NULL, &connection), words);
	MISUSE(drdma_connection_ref(bad.connection), words);
	MISUSE(drdma_connection_endpoint(bad.connection, bytes), words);
	MISUSE(drdma_connection_connect(bad.connection, bytes), words);
	MISUSE(drdma_connection_disconnect(bad.connection), words);
	MISUSE(drdma_connection_flush(bad.connection, good.region), words);
	MISUSE(drdma_connection_flush(good.connection, bad.region), words);
	MISUSE(drdma_connection_private_data(bad.connection, bytes, &size), words);
	MISUSE(drdma_connection_process(bad.connection, &next), words);
	CHECK(drdma_connection_fd(bad.connection) == -1 && says(words));

	MISUSE(drdma_write(bad.connection, good.region, good.remote, 0, &transfer), words);
	MISUSE(drdma_write(good.connection, bad.region, good.remote, 0, &transfer), words);
	MISUSE(drdma_write(good.connection, good.region, bad.remote, 0, &transfer), words);
	MISUSE(drdma_write_notify(bad.connection, good.region, good.remote, 1, 0, &transfer), words);
	MISUSE(drdma_write_notify(good.connection, bad.region, good.remote, 1, 0, &transfer), words);
	MISUSE(drdma_write_notify(good.connection, good.region, bad.remote, 1, 0, &transfer), words);
	MISUSE(drdma_read(bad.connection, good.region, good.remote, 0, &transfer), words);
	MISUSE(drdma_read(good.connection, bad.region, good.remote, 0, &transfer), words);
	MISUSE(drdma_read(good.connection, good.region, bad.remote, 0, &transfer), words);
	MISUSE(drdma_write_blocks(bad.connection, good.local_blocks, good.remote_blocks, 0, &transfer), words);
	MISUSE(drdma_write_blocks(good.connection, bad.local_blocks, good.remote_blocks, 0, &transfer), words);
	MISUSE(drdma_write_blocks(good.connection, good.local_blocks, bad.remote_blocks, 0, &transfer), words);
	MISUSE(drdma_write_blocks_notify(bad.connection, good.local_blocks, good.remote_blocks, 1, 0, &transfer), words);
	MISUSE(drdma_write_blocks_notify(good.connection, bad.local_blocks, good.remote_blocks, 1, 0, &transfer), words);
	MISUSE(drdma_write_blocks_notify(good.connection, good.local_blocks, bad.remote_blocks, 1, 0, &transfer), words);
	MISUSE(drdma_read_blocks(bad.connection, good.local_blocks, good.remote_blocks, 0, &transfer), words);
	MISUSE(drdma_read_blocks(good.connection, bad.local_blocks, good.remote_blocks, 0, &transfer), words);
	MISUSE(drdma_read_blocks(good.connection, good.local_blocks, bad.remote_blocks, 0, &transfer), words);
	MISUSE(drdma_send(bad.connection, good.region, 0, &transfer), words);
	MISUSE(drdma_send(good.connection, bad.region, 0, &transfer), words);
	MISUSE(drdma_recv(bad.connection, good.region, 0, &transfer), words);
	MISUSE(drdma_recv(good.connection, bad.region, 0, &transfer), words);
	MISUSE(drdma_fetch_add(bad.connection, good.region, good.remote, 1, 0, &transfer), words);
	MISUSE(drdma_fetch_add(good.connection, bad.region, good.remote, 1, 0, &transfer), words);
	MISUSE(drdma_fetch_add(good.connection, good.region, bad.remote, 1, 0, &transfer), words);
	MISUSE(drdma_compare_swap(bad.connection, good.region, good.remote, 1, 2, 0, &transfer), words);
	MISUSE(drdma_compare_swap(good.connection, bad.region, good.remote, 1, 2, 0, &transfer), words);
	MISUSE(drdma_compare_swap(good.connection, good.region, bad.remote, 1, 2, 0, &transfer), words);
	MISUSE(drdma_notify(bad.connection, 1, NULL, 0, 0, &transfer), words);
	MISUSE(drdma_notifications_wait(bad.connection, 1, 1, 0), words);
	MISUSE(drdma_notifications_take(bad.connection, 0, &told), words);
	MISUSE(drdma_transfer_ref(bad.transfer), words);
	MISUSE(drdma_transfer_wait(bad.transfer, 0, &number), words);
	MISUSE(drdma_transfer_try(bad.transfer), words);
	MISUSE(drdma_transfer_cancel(bad.transfer), words);
	CHECK(drdma_transfer_progress(bad.transfer) == 0 && says(words));

	MISUSE(drdma_listener_ref(bad.listener), words);
	MISUSE(drdma_listener_accept(bad.listener, 0, &incoming), words);
	CHECK(drdma_listener_port(bad.listener) == 0 && says(words));
	CHECK(drdma_listener_fd(bad.listener) == -1 && says(words));
	MISUSE(drdma_incoming_ref(bad.incoming), words);
	MISUSE(drdma_incoming_device(bad.incoming, text, sizeof text, &size), words);
	MISUSE(drdma_incoming_accept(bad.incoming, good.domain, NULL, NULL, 0, 0, &connection), words);
	MISUSE(drdma_incoming_accept(good.incoming, bad.domain, NULL, NULL, 0, 0, &connection), words);

	MISUSE(drdma_queue_pair_ref(bad.queue_pair), bad.queue_pair ? words : "NULL");
	MISUSE(drdma_queue_pair_write(bad.queue_pair, good.region, good.remote, 0), bad.queue_pair ? words : "NULL");
	MISUSE(drdma_queue_pair_read(bad.queue_pair, good.region, good.remote, 0), bad.queue_pair ? words : "NULL");
	MISUSE(drdma_queue_pair_send(bad.queue_pair, good.region, 0), bad.queue_pair ? words : "NULL");
	MISUSE(drdma_queue_pair_recv(bad.queue_pair, good.region, 0), bad.queue_pair ? words : "NULL");
	/* NULL opens a domain of its own. */
	if (bad.domain)
		MISUSE(drdma_connect("192.168.77.1:1", bad.domain, NULL, NULL, 0, 0, &connection), words);
}

/* NULL is permitted here, and only here. */
static void released_twice(struct handles bad, const char *words)
{
	MISUSE(drdma_domain_unref(bad.domain), words);
	MISUSE(drdma_region_unref(bad.region), words);
	MISUSE(drdma_remote_unref(bad.remote), words);
	MISUSE(drdma_blocks_unref(bad.local_blocks), words);
	MISUSE(drdma_connection_unref(bad.connection), words);
	MISUSE(drdma_transfer_unref(bad.transfer), words);
	MISUSE(drdma_listener_unref(bad.listener), words);
	MISUSE(drdma_incoming_unref(bad.incoming), words);
	if (bad.queue_pair)
		MISUSE(drdma_queue_pair_unref(bad.queue_pair), words);
}

static void handles_that_are_none(void)
{
	pthread_t caller, other;
	struct handles good, gone = make(&caller), mixed, addresses;
	struct handles none = { 0 };
	void *address = memory;

	release(gone, caller);
	good = make(&other);
	refused(none, good, "NULL");
	OK(drdma_domain_unref(NULL));
	OK(drdma_region_unref(NULL));
	OK(drdma_remote_unref(NULL));
	OK(drdma_blocks_unref(NULL));
	OK(drdma_connection_unref(NULL));
	OK(drdma_transfer_unref(NULL));
	OK(drdma_listener_unref(NULL));
	OK(drdma_incoming_unref(NULL));
	OK(drdma_queue_pair_unref(NULL));

	/* The good ones have taken their places. */
	refused(gone, good, "was released");
	released_twice(gone, "was released");

	mixed = (struct handles){ (drdma_domain *)good.region, (drdma_region *)good.domain,
				  (drdma_remote *)good.region, (drdma_blocks *)good.region,
				  (drdma_blocks *)good.region, (drdma_connection *)good.region,
				  (drdma_transfer *)good.region, (drdma_listener *)good.region,
				  (drdma_incoming *)good.region, (drdma_queue_pair *)good.region };
	refused(mixed, good, "was passed as");
	released_twice(mixed, "was passed as");

	addresses = (struct handles){ address, address, address, address, address,
				      address, address, address, address, address };
	refused(addresses, good, "was not returned");
	released_twice(addresses, "was not returned");
	release(good, other);
}

static void handles_are_counted(void)
{
	drdma_domain *domain;
	drdma_region *region;

	OK(drdma_domain_open("rxe0", &domain));
	for (int i = 0; i < 3; i++)
		OK(drdma_domain_ref(domain));
	for (int i = 0; i < 3; i++)
		OK(drdma_domain_unref(domain));
	CHECK(drdma_live_handles() == 1);
	OK(drdma_register_host(domain, memory, 64, 0, NULL, NULL, &region));
	CHECK(drdma_live_handles() == 2);
	OK(drdma_domain_unref(domain));
	MISUSE(drdma_domain_unref(domain), "was released");
	CHECK(drdma_region_length(region) == 64);
	OK(drdma_region_unref(region));
}

static int called;

static void count(void *context)
{
	CHECK(context == &called);
	called++;
}

static void pointers_that_are_null(void)
{
	pthread_t caller;
	struct handles all = make(&caller);
	drdma_region *region;
	drdma_remote *remote;
	drdma_blocks *blocks;
	drdma_domain *domain;
	drdma_connection *connection;
	drdma_transfer *transfer;
	drdma_queue_pair *queue_pair;
	drdma_listener *listener;
	size_t size = sizeof bytes;
	uint64_t number = 0;
	int fd;

	MISUSE(drdma_domain_open("rxe0", NULL), "drdma_domain is NULL");
	MISUSE(drdma_domain_from_pd(NULL, &domain), "ibv_pd is NULL");
	MISUSE(drdma_region_from_mr(NULL, 0, 0, &region), "ibv_mr is NULL");
	MISUSE(drdma_queue_pair_from_qp(NULL, &queue_pair), "ibv_qp is NULL");
	MISUSE(drdma_register_host(all.domain, NULL, 64, 0, count, &called, &region), "null pointer");
	MISUSE(drdma_register_host(NULL, memory, 64, 0, count, &called, &region), "NULL");
	MISUSE(drdma_register_host(all.domain, memory, 64, 0, count, &called, NULL), "place");
	CHECK(called == 3);
	MISUSE(drdma_register_dmabuf(all.domain, 0, 0, 0, 0, NULL), "place");
	MISUSE(drdma_register_pointer(all.domain, 1, 1, 0, NULL), "place");
	MISUSE(drdma_dmabuf_allocate(NULL, 4096, NULL, NULL), "place");
	MISUSE(drdma_region_slice(all.region, 0, 1, NULL), "place");
	MISUSE(drdma_region_element(all.region, NULL), "place");
	MISUSE(drdma_region_describe(all.region, bytes, NULL), "size");
	MISUSE(drdma_region_describe(all.region, NULL, &size), "0 bytes is too small for 52");
	CHECK(size == 52);
	MISUSE(drdma_remote_parse(NULL, 52, &remote), "array of 52 bytes is NULL");
	MISUSE(drdma_remote_parse(bytes, 52, NULL), "place");
	MISUSE(drdma_remote_slice(all.remote, 0, 1, NULL), "place");
	MISUSE(drdma_region_strided(all.region, 1, 1, 1, NULL), "place");
	MISUSE(drdma_remote_strided(all.remote, 1, 1, 1, NULL), "place");
	MISUSE(drdma_region_blocks(all.region, 1, NULL, 2, &blocks), "array of 2 offsets is NULL");
	MISUSE(drdma_remote_blocks(all.remote, 1, NULL, 2, &blocks), "array of 2 offsets is NULL");
	MISUSE(drdma_region_blocks(all.region, 1, &number, 1, NULL), "place");
	MISUSE(drdma_remote_blocks(all.remote, 1, &number, 1, NULL), "place");
	MISUSE(drdma_blocks_select(all.local_blocks, NULL, 2, &blocks), "array of 2 indices is NULL");
	MISUSE(drdma_blocks_select(all.local_blocks, &number, 1, NULL), "place");
	MISUSE(drdma_connection_new(all.domain, NULL, NULL), "place");
	MISUSE(drdma_connection_endpoint(all.connection, NULL), "place");
	MISUSE(drdma_connection_connect(all.connection, NULL), "NULL");
	MISUSE(drdma_connection_private_data(all.connection, NULL, NULL), "size");
	OK(drdma_connection_private_data(all.connection, NULL, &size));
	CHECK(size == 0);
	OK(drdma_connection_process(all.connection, NULL));
	MISUSE(drdma_write(all.connection, all.region, all.remote, 0, NULL), "place");
	MISUSE(drdma_write_notify(all.connection, all.region, all.remote, 1, 0, NULL), "place");
	MISUSE(drdma_read(all.connection, all.region, all.remote, 0, NULL), "place");
	MISUSE(drdma_write_blocks(all.connection, all.local_blocks, all.remote_blocks, 0, NULL), "place");
	MISUSE(drdma_write_blocks_notify(all.connection, all.local_blocks, all.remote_blocks, 1, 0, NULL), "place");
	MISUSE(drdma_read_blocks(all.connection, all.local_blocks, all.remote_blocks, 0, NULL), "place");
	MISUSE(drdma_send(all.connection, all.region, 0, NULL), "place");
	MISUSE(drdma_recv(all.connection, all.region, 0, NULL), "place");
	MISUSE(drdma_fetch_add(all.connection, all.region, all.remote, 1, 0, NULL), "place");
	MISUSE(drdma_compare_swap(all.connection, all.region, all.remote, 1, 2, 0, NULL), "place");
	MISUSE(drdma_notify(all.connection, 1, NULL, 3, 0, &transfer), "array of 3 bytes is NULL");
	MISUSE(drdma_notify(all.connection, 1, NULL, 0, 0, NULL), "place");
	MISUSE(drdma_notifications_take(all.connection, 0, NULL), "place");
	MISUSE(drdma_listen(NULL, &listener), "address is NULL");
	MISUSE(drdma_listen("192.168.77.1:0", NULL), "place");
	MISUSE(drdma_listener_accept(all.listener, 0, NULL), "place");
	MISUSE(drdma_connect(NULL, NULL, NULL, NULL, 0, 0, &connection), "address is NULL");
	MISUSE(drdma_connect("192.168.77.1:1", NULL, NULL, NULL, 2, 0, &connection), "array of 2 bytes is NULL");
	MISUSE(drdma_connect("192.168.77.1:1", NULL, NULL, NULL, 0, 0, NULL), "place");
	OK(drdma_incoming_device(all.incoming, NULL, 0, &size));
	CHECK(size == 4);
	MISUSE(drdma_incoming_accept(all.incoming, all.domain, NULL, NULL, 2, 0, &connection), "array of 2 bytes is NULL");
	MISUSE(drdma_incoming_accept(all.incoming, all.domain, NULL, NULL, 0, 0, NULL), "place");
	OK(drdma_devices(NULL, 0, NULL));
	CHECK(drdma_last_message(NULL, 0) > 0 && drdma_last_hint(NULL, 0) > 0);
	OK(drdma_dmabuf_allocate("udmabuf", 4096, &fd, NULL));
	fclose(fdopen(fd, "r"));
	release(all, caller);
}

static void arguments_that_cannot_work(void)
{
	pthread_t caller;
	struct handles all = make(&caller);
	drdma_region *region;
	drdma_remote *remote;
	drdma_blocks *blocks;
	drdma_domain *domain;
	drdma_connection *connection;
	drdma_listener *listener;
	drdma_incoming *incoming;
	drdma_transfer *transfer;
	drdma_notification told;
	drdma_options odd;
	uint64_t offsets[2] = { 0, sizeof memory };
	size_t size = 51;
	char text[10];
	int fd;

	REFUSED(drdma_domain_open("mlx5_9", &domain), DRDMA_NOT_FOUND, "rxe0, rxe1");
	MISUSE(drdma_domain_open(NULL, &domain), "name one of rxe0, rxe1");
	MISUSE(drdma_domain_open("\xff", &domain), "UTF-8");
	MISUSE(drdma_register_host(all.domain, memory, 0, 0, NULL, NULL, &region), "0 bytes");
	MISUSE(drdma_register_host(all.domain, memory, 64, DRDMA_REMOTE_WRITE, NULL, NULL, &region), "LOCAL_WRITE");
	MISUSE(drdma_register_dmabuf(all.domain, -1, 0, 0, 0, &region), "-1");
	MISUSE(drdma_register_dmabuf(all.domain, 1 << 20, 0, 0, 0, &region), "1048576");
	MISUSE(drdma_register_dmabuf(all.domain, 1, 0, 0, 0, &region), "not a dma-buf");
	MISUSE(drdma_region_slice(all.region, 4000, 97, &region), "4096");
	MISUSE(drdma_region_slice(all.region, UINT64_MAX, 2, &region), "overflows");
	MISUSE(drdma_remote_slice(all.remote, 4000, 97, &remote), "4096");
	MISUSE(drdma_region_describe(all.region, bytes, &size), "51 bytes is too small for 52");
	memset(bytes, 7, sizeof bytes);
	REFUSED(drdma_remote_parse(bytes, 52, &remote), DRDMA_INVALID_DATA, "");
	REFUSED(drdma_connection_connect(all.connection, bytes), DRDMA_INVALID_DATA, "endpoint");
	MISUSE(drdma_region_strided(all.region, 1, 1, 0, &blocks), "");
	MISUSE(drdma_region_blocks(all.region, 1, NULL, 0, &blocks), "");
	MISUSE(drdma_region_blocks(all.region, 64, offsets, 2, &blocks), "block 1");
	MISUSE(drdma_region_blocks(all.region, 64, (uint64_t *)(bytes + 1), 2, &blocks), "aligned");
	MISUSE(drdma_region_blocks(all.region, 64, offsets, SIZE_MAX / 4, &blocks), "no array has");
	MISUSE(drdma_blocks_select(all.local_blocks, offsets + 1, 1, &blocks), "4096");
	MISUSE(drdma_write_blocks(all.connection, all.remote_blocks, all.remote_blocks, 0, &transfer), "first table");
	MISUSE(drdma_write_blocks(all.connection, all.local_blocks, all.local_blocks, 0, &transfer), "second table");
	MISUSE(drdma_notifications_take(all.connection, 0, &told), "notifications");
	MISUSE(drdma_notify(all.connection, 1, memory, 65, 0, &transfer), "65");
	MISUSE(drdma_listen("nonsense", &listener), "host:port");
	REFUSED(drdma_listen("192.0.2.77:0", &listener), DRDMA_SYSTEM, "no RDMA device has this address");
	CHECK(drdma_last_errno() == EADDRNOTAVAIL);
	CHECK(drdma_listener_accept(all.listener, 0, &incoming) == DRDMA_PENDING);
	REFUSED(drdma_listener_accept(all.listener, 50, &incoming), DRDMA_TIMEOUT, "50ms");
	REFUSED(drdma_dmabuf_allocate("no-such-heap", 4096, &fd, NULL), DRDMA_NOT_FOUND, "no-such-heap");
	CHECK(drdma_last_errno() == ENOENT);
	memset(&odd, 1, sizeof odd);
	MISUSE(drdma_connection_new(all.domain, &odd, &connection), "fill the struct with zeros");
	CHECK(!strcmp(drdma_status_name(DRDMA_OK), "DRDMA_OK") && !strcmp(drdma_status_name(DRDMA_PENDING), "DRDMA_PENDING"));
	CHECK(!strcmp(drdma_status_name(DRDMA_NOT_FOUND), "DRDMA_NOT_FOUND"));
	CHECK(!strcmp(drdma_status_name(16), "unknown") && !strcmp(drdma_status_name(-1), "unknown"));
	/* A text is cut to the buffer, and ends. */
	CHECK(drdma_last_message(text, sizeof text) > sizeof text && strlen(text) == sizeof text - 1);
	release(all, caller);
}

int main(void)
{
	pthread_t caller;
	struct handles all;

	CHECK(drdma_last_status() == DRDMA_OK && drdma_last_errno() == 0 && drdma_last_message(NULL, 0) == 0);
	/* librdmacm keeps descriptors of each device. */
	all = make(&caller);
	release(all, caller);
	RUN(handles_that_are_none);
	RUN(handles_are_counted);
	RUN(pointers_that_are_null);
	RUN(arguments_that_cannot_work);
	return 0;
}
