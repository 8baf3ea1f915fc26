/* Shared by the stub libraries: memory of memfds exported as udmabufs, failures that a test requests, a count
 * of live objects, and the first wrong argument. Not thread-safe.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <linux/udmabuf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
#define BLOCK (2UL << 20)
#define MOST 1024

enum kind { FREE, DEVICE, HOST, MANAGED, POOL, IMPORTED, RESERVED };

/* One allocation, or one of several mappings in a reservation. */
struct memory {
	enum kind kind;
	/* The allocation, and the reservation that contains it. */
	uintptr_t base, size, range, range_size;
	/* The memfd, mapped at `block`, and whether other allocations use it. */
	uintptr_t block, block_size;
	int memfd, shared;
	uint64_t id;
	/* Context, agent or device. */
	void *owner;
	int device;
	int exportable, fd;
	/* The physical memory of a mapping, from 1. */
	int physical;
};

static struct memory all[MOST];
static int live;
static char misuse[200];
static char refused[64];
static int64_t refusal;
static int refusals;
/* What a test counts: look-ups of pointers, exports, flushes. */
static int lookups, exports, flushes;
static int udmabuf = -1;

/* Open the device at load time, as a driver does, so that no measured call does it. */
__attribute__((constructor)) static void open_device(void)
{
	udmabuf = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
}

/* Whether the test requested that this call fails, and the code. */
static int refuses(const char *call, int64_t *code)
{
	if (!refusals || strcmp(refused, call))
		return 0;
	refusals--;
	*code = refusal;
	return 1;
}

static int wrong(const char *call, const char *what)
{
	if (!misuse[0])
		snprintf(misuse, sizeof(misuse), "%s: %s", call, what);
	return 1;
}

/* Makes the next `times` calls of a function fail. */
void stub_refuse(const char *call, int64_t code, int times)
{
	snprintf(refused, sizeof(refused), "%s", call);
	refusal = code;
	refusals = times;
}

/* `STUB_REFUSE=CALL CODE` does so from the start, for a program that the test does not link. */
__attribute__((constructor)) static void refuse_from_the_start(void)
{
	const char *wanted = getenv("STUB_REFUSE");
	char call[sizeof(refused)];
	long code;

	if (wanted && sscanf(wanted, "%63s %ld", call, &code) == 2)
		stub_refuse(call, code, INT_MAX);
}

int stub_count(const char *what)
{
	return *what == 'l' ? lookups : *what == 'e' ? exports : flushes;
}

int stub_live(void)
{
	return live;
}

const char *stub_misuse(void)
{
	return misuse[0] ? misuse : NULL;
}

/* Entries before this one may be used, so that a look-up does not search all. */
static int used_end;

static struct memory *find(uintptr_t address)
{
	for (int i = 0; i < used_end; i++)
		if (all[i].kind != FREE && address - all[i].base < all[i].size)
			return &all[i];
	return NULL;
}

static struct memory *unused(void)
{
	for (int i = 0; i < MOST; i++)
		if (all[i].kind == FREE) {
			used_end = i < used_end ? used_end : i + 1;
			return &all[i];
		}
	return NULL;
}

static uintptr_t round_up(uintptr_t value, uintptr_t to)
{
	return (value + to - 1) / to * to;
}

/* With `stub_reuse`, new memory of at most 4 MiB gets the lowest addresses that are free, as from an allocator that
 * hands out what was freed last. */
#define SLOT (4UL << 20)
#define SLOTS 64
static int reusing;
static uintptr_t slots;

void stub_reuse(int wanted)
{
	reusing = wanted;
}

static uintptr_t lowest(void)
{
	for (uintptr_t at = slots; at < slots + SLOTS * SLOT; at += SLOT) {
		int taken = 0;

		for (int i = 0; i < MOST; i++)
			taken |= all[i].kind != FREE && all[i].block - at < SLOT;
		if (!taken)
			return at;
	}
	return 0;
}

/* Reserves addresses at a multiple of BLOCK. */
static uintptr_t reserve(uintptr_t size)
{
	void *at;

	if (reusing && size <= SLOT) {
		if (!slots) {
			reusing = 0;
			slots = reserve(SLOTS * SLOT);
			reusing = 1;
		}
		return lowest();
	}
	at = mmap(NULL, size + BLOCK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return at == MAP_FAILED ? 0 : round_up((uintptr_t)at, BLOCK);
}

/* Creates a memfd of `size` bytes, whole pages, and maps it at `at`. */
static int back(uintptr_t at, uintptr_t size)
{
	int memfd = memfd_create("stub", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (memfd < 0)
		return -1;
	if (ftruncate(memfd, size) || fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK) ||
	    mmap((void *)at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memfd, 0) == MAP_FAILED) {
		close(memfd);
		return -1;
	}
	return memfd;
}

/* Creates an allocation with its own memory, in whole pages. */
static struct memory *make(enum kind kind, uintptr_t size, void *owner, int device)
{
	static uint64_t ids;
	struct memory *new = unused();
	uintptr_t whole = round_up(size, PAGE), at;
	int memfd;

	if (!new || size > (1UL << 32) || !(at = reserve(whole)) || (memfd = back(at, whole)) < 0)
		return NULL;
	*new = (struct memory){ .kind = kind, .base = at, .size = size, .range = at, .range_size = size,
				.block = at, .block_size = whole, .memfd = memfd, .id = ++ids,
				.owner = owner, .device = device, .fd = -1 };
	live++;
	return new;
}

static void release(struct memory *memory)
{
	int last = 1;

	for (int i = 0; i < MOST; i++)
		if (all[i].kind != FREE && &all[i] != memory && all[i].memfd == memory->memfd)
			last = 0;
	if (last && !memory->physical) {
		/* Keep the addresses reserved, so that a freed pointer belongs to no allocation. */
		mmap((void *)memory->block, memory->block_size, PROT_NONE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
		close(memory->memfd);
	}
	if (memory->fd >= 0)
		close(memory->fd);
	memory->kind = FREE;
	live--;
}

/* With `stub_nonsense`, the next look-ups or exports succeed with numbers that cannot be true. */
enum nonsense { SENSE, SIZE_ZERO, BASE_ABOVE, SHORT_BUFFER, RANGE_ELSEWHERE };
static int nonsense;

void stub_nonsense(int which)
{
	nonsense = which;
}

/* With `stub_bare`, exports succeed without a descriptor, as those of some drivers do. */
static int bare;

void stub_bare(int wanted)
{
	bare = wanted;
}

/* With `stub_share`, all exports of one range share this dma-buf. */
static int sharing, shared = -1;
static struct udmabuf_create shared_range;

void stub_share(int wanted)
{
	sharing = wanted;
	if (shared >= 0)
		close(shared);
	shared = -1;
}

/* Exports whole pages of the memfd as a dma-buf. */
static int dmabuf(const struct memory *memory, uintptr_t address, uintptr_t length, int flags)
{
	struct udmabuf_create create = { .memfd = memory->memfd, .flags = flags,
					 .offset = address - memory->block, .size = length };

	exports++;
	if (nonsense == SHORT_BUFFER)
		create.size = PAGE;
	if (!sharing)
		return ioctl(udmabuf, UDMABUF_CREATE, &create);
	if (shared < 0 || memcmp(&create, &shared_range, sizeof(create))) {
		stub_share(1);
		shared_range = create;
		shared = ioctl(udmabuf, UDMABUF_CREATE, &create);
	}
	return shared < 0 ? -1 : fcntl(shared, flags ? F_DUPFD_CLOEXEC : F_DUPFD, 3);
}
