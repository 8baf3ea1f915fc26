/* CUDA: physical memory mapped into reserved addresses. Part of cuda.c. */

/* The handle that was mapped, retained once more. */
int cuMemRetainAllocationHandle(unsigned long long *handle, void *address)
{
	const struct memory *memory = find((uintptr_t)address);

	BEGIN(cuMemRetainAllocationHandle);
	NEEDS(cuMemRetainAllocationHandle, handle);
	if (!memory || !memory->physical)
		return INVALID_VALUE;
	physical[memory->physical - 1].references++;
	live++;
	*handle = memory->physical;
	return OK;
}

static void drop_physical(int handle)
{
	struct physical *of = &physical[handle - 1];

	live--;
	if (!--of->references) {
		close(of->memfd);
		of->memfd = 0;
	}
}

int cuMemRelease(unsigned long long handle)
{
	BEGIN(cuMemRelease);
	NEEDS(cuMemRelease, handle > 0 && handle <= MOST && physical[handle - 1].references > 0);
	drop_physical(handle);
	return OK;
}

int cuMemGetAllocationPropertiesFromHandle(int *properties, unsigned long long handle)
{
	BEGIN(cuMemGetAllocationPropertiesFromHandle);
	NEEDS(cuMemGetAllocationPropertiesFromHandle,
	      handle > 0 && handle <= MOST && physical[handle - 1].references > 0);
	memset(properties, 0, 32);
	/* CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE. */
	properties[0] = properties[2] = 1;
	properties[3] = physical[handle - 1].device;
	((char *)properties)[25] = physical[handle - 1].capable;
	return OK;
}

/* For the test: cuMemAddressReserve, whose BUFFER_ID all its mappings have, however often they change. That is the worst
 * that the documents allow. */
uintptr_t stub_reserve(size_t size)
{
	return reserve(size);
}

/* For the test: cuMemCreate. */
unsigned long long stub_create(size_t size, int device, int capable)
{
	for (int i = 0; i < MOST; i++)
		if (!physical[i].references) {
			int memfd = memfd_create("stub", MFD_CLOEXEC | MFD_ALLOW_SEALING);

			if (memfd < 0 || ftruncate(memfd, size) || fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK))
				return 0;
			physical[i] = (struct physical){ memfd, device, capable, 1, size };
			live++;
			return i + 1;
		}
	return 0;
}

/* For the test: cuMemMap and cuMemSetAccess. The mapping holds the memory. */
int stub_place(uintptr_t reservation, size_t reserved, uintptr_t address, unsigned long long handle)
{
	struct physical *of = &physical[handle - 1];
	struct memory *new = unused();

	initialised = 1;
	if (!new || mmap((void *)address, of->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, of->memfd, 0) ==
			    MAP_FAILED)
		return -1;
	*new = (struct memory){ .kind = DEVICE, .base = address, .size = of->size, .range = reservation,
				.range_size = reserved, .block = address, .block_size = of->size,
				.memfd = of->memfd, .id = reservation, .device = of->device, .fd = -1,
				.physical = handle };
	of->references++;
	live += 2;
	return 0;
}

/* For the test: cuMemUnmap of one mapping. */
void stub_remove(uintptr_t address)
{
	struct memory *memory = find(address);
	int handle = memory->physical;

	mmap((void *)memory->base, memory->size, PROT_NONE,
	     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	release(memory);
	drop_physical(handle);
}

/* Reservations of cuMemAddressReserve. */
static struct {
	uintptr_t base, size;
} reservations[MOST];

int cuMemGetAllocationGranularity(size_t *granularity, const int *properties, int option)
{
	BEGIN(cuMemGetAllocationGranularity);
	NEEDS(cuMemGetAllocationGranularity, granularity && properties[0] == 1 && option <= 1);
	*granularity = BLOCK;
	return OK;
}

int cuMemAddressReserve(uintptr_t *base, size_t size, size_t alignment, uintptr_t hint, unsigned long long flags)
{
	BEGIN(cuMemAddressReserve);
	NEEDS(cuMemAddressReserve, base && size && size % PAGE == 0 && !alignment && !hint && !flags);
	for (int i = 0; i < MOST; i++)
		if (!reservations[i].size) {
			reservations[i].base = *base = reserve(size);
			reservations[i].size = size;
			live++;
			return OK;
		}
	return OUT_OF_MEMORY;
}

int cuMemAddressFree(uintptr_t base, size_t size)
{
	BEGIN(cuMemAddressFree);
	NEEDS(cuMemAddressFree, !find(base));
	for (int i = 0; i < MOST; i++)
		if (reservations[i].base == base && reservations[i].size == size) {
			reservations[i].size = reservations[i].base = 0;
			live--;
			return OK;
		}
	return wrong("cuMemAddressFree", "it was not reserved"), INVALID_VALUE;
}

int cuMemCreate(unsigned long long *handle, size_t size, const int *properties, unsigned long long flags)
{
	BEGIN(cuMemCreate);
	/* CU_MEM_ALLOCATION_TYPE_PINNED, no handle type, CU_MEM_LOCATION_TYPE_DEVICE. */
	NEEDS(cuMemCreate, handle && size && size % BLOCK == 0 && !flags);
	NEEDS(cuMemCreate, properties[0] == 1 && !properties[1] && properties[2] == 1);
	NEEDS(cuMemCreate, properties[3] >= 0 && properties[3] < GPUS);
	*handle = stub_create(size, properties[3], ((const char *)properties)[25]);
	return *handle ? OK : OUT_OF_MEMORY;
}

int cuMemMap(uintptr_t address, size_t size, size_t offset, unsigned long long handle, unsigned long long flags)
{
	BEGIN(cuMemMap);
	NEEDS(cuMemMap, handle > 0 && handle <= MOST && physical[handle - 1].references > 0);
	NEEDS(cuMemMap, physical[handle - 1].size == size && !offset && !flags && !find(address));
	for (int i = 0; i < MOST; i++)
		if (address - reservations[i].base < reservations[i].size)
			return stub_place(reservations[i].base, reservations[i].size, address, handle) ?
				       OUT_OF_MEMORY :
				       OK;
	return wrong("cuMemMap", "the address is not reserved"), INVALID_VALUE;
}

int cuMemSetAccess(uintptr_t address, size_t size, const int *access, size_t count)
{
	BEGIN(cuMemSetAccess);
	NEEDS(cuMemSetAccess, find(address) && size && count == 1 && access[0] == 1 && access[2] == 3);
	return OK;
}

int cuMemUnmap(uintptr_t address, size_t size)
{
	const struct memory *memory = find(address);

	BEGIN(cuMemUnmap);
	NEEDS(cuMemUnmap, memory && memory->physical && memory->base == address && memory->size == size);
	stub_remove(address);
	return OK;
}

/* For the test: `count` mappings of `size` bytes, back to back in a reservation with a hole after them. */
uintptr_t stub_map(int count, size_t size, int device)
{
	uintptr_t base = reserve((count + 1) * size);

	for (int i = 0; i < count; i++) {
		unsigned long long handle = stub_create(size, device, 1);

		if (!handle || stub_place(base, (count + 1) * size, base + i * size, handle))
			return 0;
		/* As applications do: the mapping holds the memory. */
		drop_physical(handle);
	}
	return base;
}

void stub_unmap(uintptr_t base)
{
	const struct memory *memory;

	while ((memory = find(base))) {
		uintptr_t size = memory->size;

		stub_remove(base);
		base += size;
	}
}
