/* Transfers of every kind between two connections, with the bytes compared at the far end. */
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"

enum { SIZE = 1 << 16 };

static int released;

static void release(void *context)
{
	free(context);
	released++;
}

static void host_memory_is_written_read_sent_and_received(void)
{
	struct pair pair = make_pair(NULL);
	unsigned char *ours = malloc(SIZE), *theirs = calloc(1, SIZE);
	drdma_region *near, *far, *part;
	drdma_remote *remote, *piece;
	drdma_transfer *transfer, *receiving;

	fill(ours, SIZE, 1);
	OK(drdma_register_host(pair.near_domain, ours, SIZE, DRDMA_REMOTE, release, ours, &near));
	OK(drdma_register_host(pair.far_domain, theirs, SIZE, DRDMA_REMOTE, release, theirs, &far));
	CHECK(drdma_region_length(near) == SIZE);
	remote = described(far);
	CHECK(drdma_remote_length(remote) == SIZE);
	OK(drdma_write(pair.near, near, remote, -1, &transfer));
	finish(transfer, SIZE);
	CHECK(!memcmp(ours, theirs, SIZE));

	OK(drdma_region_slice(near, 100, 50, &part));
	OK(drdma_remote_slice(remote, 7, 50, &piece));
	OK(drdma_read(pair.near, part, piece, 30000, &transfer));
	finish(transfer, 50);
	CHECK(!memcmp(ours + 100, theirs + 7, 50));
	MISUSE(drdma_write(pair.near, part, remote, -1, &transfer), "50");

	OK(drdma_recv(pair.far, far, -1, &receiving));
	CHECK(drdma_transfer_wait(receiving, 50, NULL) == DRDMA_PENDING);
	CHECK(drdma_transfer_wait(receiving, 0, NULL) == DRDMA_PENDING);
	CHECK(drdma_transfer_try(receiving) == DRDMA_PENDING);
	fill(ours, SIZE, 2);
	OK(drdma_send(pair.near, near, -1, &transfer));
	finish(transfer, SIZE);
	finish(receiving, SIZE);
	CHECK(!memcmp(ours, theirs, SIZE));

	/* The memory outlives its handle while something uses it, and goes with the last use. */
	OK(drdma_region_unref(near));
	CHECK(released == 0);
	OK(drdma_region_unref(far));
	CHECK(released == 1);
	OK(drdma_region_unref(part));
	CHECK(released == 2);
	OK(drdma_remote_unref(remote));
	OK(drdma_remote_unref(piece));
	release_pair(pair);
}

static void integers_are_changed_atomically(void)
{
	struct pair pair = make_pair(NULL);
	static uint64_t before, word = 40;
	drdma_region *near, *far;
	drdma_remote *remote;
	drdma_transfer *transfer;

	OK(drdma_register_host(pair.near_domain, &before, 8, DRDMA_LOCAL_WRITE, NULL, NULL, &near));
	OK(drdma_register_host(pair.far_domain, &word, 8, DRDMA_REMOTE, NULL, NULL, &far));
	remote = described(far);
	OK(drdma_fetch_add(pair.near, near, remote, 2, -1, &transfer));
	finish(transfer, 8);
	CHECK(before == 40 && word == 42);
	OK(drdma_compare_swap(pair.near, near, remote, 42, 7, -1, &transfer));
	finish(transfer, 8);
	CHECK(before == 42 && word == 7);
	OK(drdma_compare_swap(pair.near, near, remote, 42, 8, -1, &transfer));
	finish(transfer, 8);
	CHECK(before == 7 && word == 7);
	OK(drdma_region_unref(near));
	OK(drdma_region_unref(far));
	OK(drdma_remote_unref(remote));
	release_pair(pair);
}

static void tables_of_blocks_go_in_one_call(void)
{
	drdma_options options = { .notifications = 8 };
	struct pair pair = make_pair(&options);
	static unsigned char ours[SIZE], theirs[SIZE];
	uint64_t offsets[16], indices[3] = { 15, 0, 7 };
	drdma_region *near, *far;
	drdma_remote *remote;
	drdma_blocks *from, *to, *reversed, *some, *three;
	drdma_transfer *transfer;

	fill(ours, SIZE, 3);
	OK(drdma_register_host(pair.near_domain, ours, SIZE, DRDMA_LOCAL_WRITE, NULL, NULL, &near));
	OK(drdma_register_host(pair.far_domain, theirs, SIZE, DRDMA_REMOTE, NULL, NULL, &far));
	remote = described(far);
	for (int i = 0; i < 16; i++)
		offsets[i] = (uint64_t)(15 - i) * 1000;
	OK(drdma_region_blocks(near, 64, offsets, 16, &from));
	OK(drdma_remote_strided(remote, 64, 64, 16, &to));
	OK(drdma_remote_blocks(remote, 64, offsets, 16, &reversed));
	CHECK(drdma_blocks_count(from) == 16 && drdma_blocks_count(to) == 16);
	OK(drdma_write_blocks(pair.near, from, to, -1, &transfer));
	finish(transfer, 16 * 64);
	for (int i = 0; i < 16; i++)
		CHECK(!memcmp(ours + offsets[i], theirs + 64 * i, 64));
	memset(theirs, 0, SIZE);
	OK(drdma_blocks_select(from, indices, 3, &some));
	OK(drdma_blocks_select(to, indices, 3, &three));
	OK(drdma_write_blocks_notify(pair.near, some, three, 9, -1, &transfer));
	OK(drdma_notifications_wait(pair.far, 9, 1, 30000));
	finish(transfer, 3 * 64);
	CHECK(!memcmp(ours + offsets[7], theirs + 64 * 7, 64) && theirs[64] == 0);
	fill(theirs, SIZE, 4);
	OK(drdma_read_blocks(pair.near, from, reversed, -1, &transfer));
	finish(transfer, 16 * 64);
	for (int i = 0; i < 16; i++)
		CHECK(!memcmp(ours + offsets[i], theirs + offsets[i], 64));
	OK(drdma_blocks_unref(from));
	OK(drdma_blocks_unref(to));
	OK(drdma_blocks_unref(reversed));
	OK(drdma_blocks_unref(some));
	OK(drdma_blocks_unref(three));
	OK(drdma_region_unref(near));
	OK(drdma_region_unref(far));
	OK(drdma_remote_unref(remote));
	release_pair(pair);
}

static void a_dmabuf_is_written_and_told(void)
{
	drdma_options options = { .notifications = 8 };
	struct pair pair = make_pair(&options);
	static unsigned char ours[4096];
	drdma_notification told;
	drdma_transfer *transfer;
	drdma_region *near, *far;
	drdma_remote *remote;
	unsigned char *map;
	uint64_t length;
	int fd;

	fill(ours, sizeof ours, 4);
	OK(drdma_dmabuf_allocate("udmabuf", 8000, &fd, &length));
	CHECK(length == 8192);
	map = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(map != MAP_FAILED);
	OK(drdma_register_dmabuf(pair.far_domain, fd, 4096, 0, DRDMA_REMOTE, &far));
	close(fd);
	OK(drdma_register_host(pair.near_domain, ours, sizeof ours, 0, NULL, NULL, &near));
	remote = described(far);
	CHECK(drdma_notifications_take(pair.far, 0, &told) == DRDMA_PENDING);
	OK(drdma_write_notify(pair.near, near, remote, 77, -1, &transfer));
	finish(transfer, sizeof ours);
	OK(drdma_notifications_wait(pair.far, 77, 1, 30000));
	CHECK(!memcmp(map + 4096, ours, sizeof ours));
	OK(drdma_notify(pair.near, 5, "payload", 7, -1, &transfer));
	finish(transfer, 0);
	OK(drdma_notifications_take(pair.far, 30000, &told));
	CHECK(told.id == 5 && told.size == 7 && !memcmp(told.payload, "payload\0", 8));
	REFUSED(drdma_notifications_take(pair.far, 50, &told), DRDMA_TIMEOUT, "50ms");
	REFUSED(drdma_notifications_wait(pair.far, 5, 2, 50), DRDMA_TIMEOUT, "50ms");
	OK(drdma_region_unref(near));
	OK(drdma_region_unref(far));
	OK(drdma_remote_unref(remote));
	munmap(map, length);
	release_pair(pair);
}

static void a_loop_drives_transfers(void)
{
	struct pair pair = make_pair(NULL);
	static unsigned char ours[SIZE], theirs[SIZE];
	drdma_region *near, *far;
	drdma_remote *remote;
	drdma_transfer *transfer;
	struct pollfd watched = { .events = POLLIN };
	int64_t next;

	fill(ours, SIZE, 6);
	OK(drdma_register_host(pair.near_domain, ours, SIZE, 0, NULL, NULL, &near));
	OK(drdma_register_host(pair.far_domain, theirs, SIZE, DRDMA_REMOTE, NULL, NULL, &far));
	remote = described(far);
	watched.fd = drdma_connection_fd(pair.near);
	CHECK(watched.fd >= 0);
	OK(drdma_connection_process(pair.near, &next));
	CHECK(next == -1);
	OK(drdma_write(pair.near, near, remote, 30000, &transfer));
	OK(drdma_connection_process(pair.near, &next));
	while (drdma_transfer_try(transfer) == DRDMA_PENDING) {
		CHECK(next > 0 && next <= 30000);
		CHECK(poll(&watched, 1, (int)next) == 1);
		OK(drdma_connection_process(pair.near, &next));
	}
	OK(drdma_transfer_try(transfer));
	CHECK(!memcmp(ours, theirs, SIZE));
	OK(drdma_transfer_unref(transfer));
	OK(drdma_region_unref(near));
	OK(drdma_region_unref(far));
	OK(drdma_remote_unref(remote));
	release_pair(pair);
}

static void a_transfer_ends_by_cancel_timeout_and_failure(void)
{
	struct pair pair = make_pair(NULL);
	static unsigned char ours[64], theirs[64];
	drdma_region *near, *far;
	drdma_remote *remote;
	drdma_transfer *transfer;

	OK(drdma_register_host(pair.near_domain, ours, 64, DRDMA_LOCAL_WRITE, NULL, NULL, &near));
	OK(drdma_register_host(pair.far_domain, theirs, 64, DRDMA_LOCAL_WRITE, NULL, NULL, &far));
	remote = described(far);
	OK(drdma_recv(pair.near, near, 50, &transfer));
	REFUSED(drdma_transfer_wait(transfer, -1, NULL), DRDMA_TIMEOUT, "50ms");
	OK(drdma_transfer_cancel(transfer));
	REFUSED(drdma_transfer_wait(transfer, -1, NULL), DRDMA_CANCELLED, "cancel");
	OK(drdma_transfer_unref(transfer));
	/* The peer permits no write. */
	MISUSE(drdma_write(pair.near, near, remote, -1, &transfer), "REMOTE_WRITE");
	OK(drdma_connection_disconnect(pair.near));
	REFUSED(drdma_send(pair.near, near, -1, &transfer), DRDMA_TRANSPORT, "disconnect");
	OK(drdma_region_unref(near));
	OK(drdma_region_unref(far));
	OK(drdma_remote_unref(remote));
	release_pair(pair);
}

/* What the threads share, with a reference each. */
static struct pair shared;
static drdma_region *from;
static drdma_remote *to;

static void *writes(void *unused)
{
	for (int i = 0; i < 50; i++) {
		drdma_region *part;
		drdma_remote *place;
		drdma_transfer *transfer;

		OK(drdma_region_ref(from));
		OK(drdma_region_slice(from, 0, 64, &part));
		OK(drdma_remote_slice(to, 0, 64, &place));
		OK(drdma_write(shared.near, part, place, 30000, &transfer));
		OK(drdma_transfer_ref(transfer));
		OK(drdma_transfer_unref(transfer));
		OK(drdma_region_unref(part));
		OK(drdma_remote_unref(place));
		if (i % 2)
			OK(drdma_transfer_wait(transfer, 30000, NULL));
		OK(drdma_transfer_unref(transfer));
		OK(drdma_region_unref(from));
		MISUSE(drdma_transfer_try(transfer), "was released");
	}
	return unused;
}

static void threads_share_handles(void)
{
	static unsigned char ours[64], theirs[64];
	pthread_t threads[4];

	shared = make_pair(NULL);
	fill(ours, sizeof ours, 8);
	OK(drdma_register_host(shared.near_domain, ours, 64, 0, NULL, NULL, &from));
	drdma_region *far;
	OK(drdma_register_host(shared.far_domain, theirs, 64, DRDMA_REMOTE, NULL, NULL, &far));
	to = described(far);
	for (int i = 0; i < 4; i++)
		CHECK(!pthread_create(&threads[i], NULL, writes, NULL));
	for (int i = 0; i < 4; i++)
		CHECK(!pthread_join(threads[i], NULL));
	drdma_transfer *last;
	OK(drdma_write(shared.near, from, to, 30000, &last));
	finish(last, 64);
	CHECK(!memcmp(ours, theirs, 64));
	OK(drdma_region_unref(from));
	OK(drdma_region_unref(far));
	OK(drdma_remote_unref(to));
	release_pair(shared);
}

int main(void)
{
	RUN(host_memory_is_written_read_sent_and_received);
	RUN(integers_are_changed_atomically);
	RUN(tables_of_blocks_go_in_one_call);
	RUN(a_dmabuf_is_written_and_told);
	RUN(a_loop_drives_transfers);
	RUN(a_transfer_ends_by_cancel_timeout_and_failure);
	RUN(threads_share_handles);
	return 0;
}
