/*
 * Registers a dma-buf and writes it to a peer, whose memory is a dma-buf too.
 *
 *   write_dmabuf receive 192.0.2.1:7474
 *   write_dmabuf send 192.0.2.1:7474
 *
 * The receiver replies to the connection with the description of its memory. A notification tells it that the bytes have
 * come, and it compares them.
 */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "example.h"

enum { SIZE = 1 << 20 };

/* A new dma-buf, mapped. A GPU, a camera or another process gives you a descriptor as well. */
static unsigned char *allocate(int *fd)
{
	unsigned char *map;

	check(drdma_dmabuf_allocate(NULL, SIZE, fd, NULL), "cannot allocate a dma-buf");
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	if (map == MAP_FAILED) {
		perror("cannot map the dma-buf");
		exit(1);
	}
	return map;
}

static int receive(const char *address)
{
	drdma_options options = { .notifications = 4 };
	unsigned char description[128], *map;
	size_t size = sizeof description;
	drdma_connection *connection;
	drdma_incoming *incoming;
	drdma_listener *listener;
	drdma_domain *domain;
	drdma_region *region;
	drdma_notification more;
	char device[64];
	int fd, wrong = 0;

	check(drdma_listen(address, &listener), "cannot listen");
	printf("listening\n");
	fflush(stdout);
	check(drdma_listener_accept(listener, TIMEOUT, &incoming), "nobody connects");
	check(drdma_incoming_device(incoming, device, sizeof device, NULL), "no device");
	check(drdma_domain_open(device, &domain), "cannot open the device");

	map = allocate(&fd);
	check(drdma_register_dmabuf(domain, fd, 0, 0, DRDMA_REMOTE, &region), "cannot register the dma-buf");
	close(fd); /* The region has the memory now. */
	check(drdma_region_describe(region, description, &size), "cannot describe the region");
	check(drdma_incoming_accept(incoming, domain, &options, description, size, TIMEOUT, &connection),
	      "cannot accept");

	check(drdma_notifications_wait(connection, 1, 1, TIMEOUT), "the bytes have not come");
	for (size_t at = 0; at < SIZE && !wrong; at++)
		wrong = map[at] != byte(at);
	/* The sender disconnects first: a disconnect could overtake the acknowledgement of its write. */
	drdma_notifications_take(connection, TIMEOUT, &more);
	printf("received %d bytes, %s\n", SIZE, wrong ? "and some are wrong" : "verified");

	drdma_connection_unref(connection);
	drdma_region_unref(region);
	drdma_domain_unref(domain);
	drdma_incoming_unref(incoming);
	drdma_listener_unref(listener);
	munmap(map, SIZE);
	return wrong;
}

static int send_to(const char *address)
{
	unsigned char reply[256], *map;
	size_t size = sizeof reply;
	drdma_connection *connection;
	drdma_transfer *transfer;
	drdma_domain *domain;
	drdma_region *region;
	drdma_remote *remote;
	uint64_t bytes;
	int fd;

	/* Where there is only one device, NULL opens it. */
	check(drdma_domain_open(getenv("RDMA_DEVICE") ? getenv("RDMA_DEVICE") : "rxe0", &domain), "cannot open the device");
	check(drdma_connect(address, domain, NULL, NULL, 0, TIMEOUT, &connection), "cannot connect");
	check(drdma_connection_private_data(connection, reply, &size), "no reply");
	check(drdma_remote_parse(reply, size, &remote), "the reply describes no memory");

	map = allocate(&fd);
	for (size_t at = 0; at < SIZE; at++)
		map[at] = byte(at);
	check(drdma_register_dmabuf(domain, fd, 0, 0, 0, &region), "cannot register the dma-buf");
	close(fd);
	check(drdma_write_notify(connection, region, remote, 1, -1, &transfer), "cannot start to write");
	check(drdma_transfer_wait(transfer, TIMEOUT, &bytes), "cannot write");
	printf("wrote %llu bytes\n", (unsigned long long)bytes);

	drdma_transfer_unref(transfer);
	drdma_remote_unref(remote);
	drdma_region_unref(region);
	drdma_connection_unref(connection);
	drdma_domain_unref(domain);
	munmap(map, SIZE);
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
