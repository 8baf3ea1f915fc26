/*
 * Drives everything from one epoll loop: no call waits, and no thread is started.
 *
 *   event_loop receive 192.0.2.1:7476
 *   event_loop send 192.0.2.1:7476
 *
 * A TCP socket carries the endpoints and the description of the memory, and the loop watches it beside the descriptor of
 * the connection. The sender keeps several writes in flight. The receiver takes their notifications and compares the bytes.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "example.h"

enum { PIECES = 16, PIECE = 64 << 10, SIZE = PIECES * PIECE, DESCRIPTION = 52, MOST = DRDMA_ENDPOINT_BYTES + DESCRIPTION };

/* One side, receiving or sending. */
struct side {
	int sending, epoll, socket;
	/* What comes through the socket, and how much of it is there. */
	unsigned char message[MOST];
	size_t expected, came;
	unsigned char *memory;
	drdma_domain *domain;
	drdma_region *region;
	drdma_connection *connection;
	drdma_transfer *writes[PIECES];
	/* Writes that have completed, or notifications that have come. */
	int done;
	/* Whether the peer has closed its socket. The sender does so when all its writes are acknowledged. */
	int closed;
};

static int failed(const char *what)
{
	perror(what);
	exit(1);
}

static void watch(struct side *side, int fd, uint32_t events)
{
	struct epoll_event event = { .events = events, .data = { .fd = fd } };

	if (epoll_ctl(side->epoll, EPOLL_CTL_ADD, fd, &event))
		failed("epoll_ctl");
}

/* So few bytes fit into the buffer of a new socket. */
static void tell(struct side *side, const void *bytes, size_t size)
{
	if (send(side->socket, bytes, size, MSG_NOSIGNAL) != (ssize_t)size)
		failed("send");
}

/* Makes the connection, registers the memory, and has the loop watch the connection. */
static void set_up(struct side *side)
{
	drdma_options options = { .notifications = PIECES };
	const char *device = getenv("RDMA_DEVICE") ? getenv("RDMA_DEVICE") : side->sending ? "rxe0" : "rxe1";
	uint32_t access = side->sending ? 0 : DRDMA_REMOTE;

	side->memory = calloc(1, SIZE);
	check(drdma_domain_open(device, &side->domain), "cannot open the device");
	check(drdma_register_host(side->domain, side->memory, SIZE, access, free, side->memory, &side->region),
	      "cannot register the memory");
	check(drdma_connection_new(side->domain, &options, &side->connection), "cannot make a connection");
	watch(side, drdma_connection_fd(side->connection), EPOLLIN);
}

/* Starts all writes: they are posted as far as the window permits, and the rest by drdma_connection_process(). */
static void start_writes(struct side *side, drdma_remote *remote)
{
	for (size_t at = 0; at < SIZE; at++)
		side->memory[at] = byte(at);
	for (int i = 0; i < PIECES; i++) {
		drdma_region *from;
		drdma_remote *to;

		check(drdma_region_slice(side->region, (uint64_t)i * PIECE, PIECE, &from), "cannot slice");
		check(drdma_remote_slice(remote, (uint64_t)i * PIECE, PIECE, &to), "cannot slice");
		check(drdma_write_notify(side->connection, from, to, (uint32_t)i, TIMEOUT, &side->writes[i]), "cannot write");
		/* The transfer has what it needs. */
		drdma_region_unref(from);
		drdma_remote_unref(to);
	}
}

/* The peer's message is complete: an endpoint, and from the receiver its memory. */
static void come(struct side *side)
{
	unsigned char message[MOST];
	size_t size = DESCRIPTION;
	drdma_remote *remote;

	if (!side->sending)
		set_up(side);
	check(drdma_connection_connect(side->connection, side->message), "cannot connect");
	if (side->sending) {
		check(drdma_remote_parse(side->message + DRDMA_ENDPOINT_BYTES, DESCRIPTION, &remote), "no memory");
		start_writes(side, remote);
		drdma_remote_unref(remote);
		return;
	}
	check(drdma_connection_endpoint(side->connection, message), "no endpoint");
	check(drdma_region_describe(side->region, message + DRDMA_ENDPOINT_BYTES, &size), "cannot describe the memory");
	tell(side, message, sizeof message);
}

/* The socket is readable. */
static void hear(struct side *side)
{
	/* Nothing comes after the message, so one byte more shows the end. */
	unsigned char bytes[MOST + 1];
	ssize_t count = recv(side->socket, bytes, side->expected - side->came + 1, 0);

	if (count < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (count < 0)
		failed("recv");
	if (count == 0) {
		epoll_ctl(side->epoll, EPOLL_CTL_DEL, side->socket, NULL);
		side->closed = 1;
		return;
	}
	if ((size_t)count > side->expected - side->came) {
		fprintf(stderr, "the peer sends more than it should\n");
		exit(1);
	}
	memcpy(side->message + side->came, bytes, (size_t)count);
	side->came += (size_t)count;
	if (side->came == side->expected)
		come(side);
}

/* After progress: which writes have completed, or which pieces have come. */
static void look(struct side *side)
{
	drdma_notification told;
	drdma_status status;

	while (side->sending && side->done < PIECES && side->writes[side->done]) {
		status = drdma_transfer_try(side->writes[side->done]);
		if (status == DRDMA_PENDING)
			return;
		check(status, "a write failed");
		drdma_transfer_unref(side->writes[side->done++]);
	}
	while (!side->sending && side->done < PIECES) {
		status = drdma_notifications_take(side->connection, 0, &told);
		if (status == DRDMA_PENDING)
			return;
		check(status, "the connection failed");
		for (size_t at = (size_t)told.id * PIECE; at < (size_t)(told.id + 1) * PIECE; at++)
			if (side->memory[at] != byte(at)) {
				fprintf(stderr, "byte %zu is wrong\n", at);
				exit(1);
			}
		side->done++;
	}
}

static int finished(const struct side *side)
{
	return side->done == PIECES && (side->sending || side->closed);
}

static void run(struct side *side, int listener)
{
	while (!finished(side)) {
		struct epoll_event event;
		int64_t next = -1;
		int count;

		if (side->connection) {
			/* It takes what has come, so look before sleeping: nothing may come after it. */
			check(drdma_connection_process(side->connection, &next), "no progress");
			look(side);
			if (finished(side))
				break;
		}
		count = epoll_wait(side->epoll, &event, 1, next > TIMEOUT || next < 0 ? TIMEOUT : (int)next);
		if (count < 0 && errno != EINTR)
			failed("epoll_wait");
		if (count > 0 && event.data.fd == listener) {
			side->socket = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
			if (side->socket >= 0)
				watch(side, side->socket, EPOLLIN);
		} else if (count > 0 && event.data.fd == side->socket) {
			if (event.events & EPOLLERR)
				failed("the peer is not there");
			if (event.events & EPOLLOUT) {
				/* Connected: tell the endpoint, then wait for the answer. */
				unsigned char endpoint[DRDMA_ENDPOINT_BYTES];
				struct epoll_event input = { .events = EPOLLIN, .data = { .fd = side->socket } };

				set_up(side);
				check(drdma_connection_endpoint(side->connection, endpoint), "no endpoint");
				tell(side, endpoint, sizeof endpoint);
				epoll_ctl(side->epoll, EPOLL_CTL_MOD, side->socket, &input);
			} else {
				hear(side);
			}
		}
	}
}

int main(int count, char **words)
{
	struct side side = { .socket = -1 };
	struct sockaddr_in address = { .sin_family = AF_INET };
	int tcp = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
	char *port = count == 3 ? strchr(words[2], ':') : NULL;

	if (!port || (strcmp(words[1], "receive") && strcmp(words[1], "send"))) {
		fprintf(stderr, "usage: %s receive|send HOST:PORT\n", words[0]);
		return 2;
	}
	*port++ = 0;
	address.sin_port = htons((uint16_t)atoi(port));
	if (inet_pton(AF_INET, words[2], &address.sin_addr) != 1)
		return fprintf(stderr, "%s is no IPv4 address\n", words[2]), 2;
	side.sending = !strcmp(words[1], "send");
	side.expected = side.sending ? MOST : DRDMA_ENDPOINT_BYTES;
	side.epoll = epoll_create1(EPOLL_CLOEXEC);
	if (side.sending) {
		side.socket = tcp;
		if (connect(tcp, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
			failed("connect");
		watch(&side, tcp, EPOLLOUT);
	} else {
		setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
		if (bind(tcp, (struct sockaddr *)&address, sizeof address) || listen(tcp, 1))
			failed("listen");
		watch(&side, tcp, EPOLLIN);
		printf("listening\n");
		fflush(stdout);
	}
	run(&side, side.sending ? -1 : tcp);
	printf(side.sending ? "wrote %d bytes\n" : "received %d bytes, verified\n", SIZE);
	drdma_connection_unref(side.connection);
	drdma_region_unref(side.region);
	drdma_domain_unref(side.domain);
	close(side.epoll);
	if (side.socket != tcp)
		close(side.socket);
	close(tcp);
	return 0;
}
