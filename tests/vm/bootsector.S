/*
 * A boot sector that proves that it came over the wire and that the disk
 * below it works: it says so on COM1, reads two sectors and writes one through
 * the BIOS, and switches the machine off.
 *
 *     AOEDE-BOOT: sector 0 runs
 *     AOEDE-BOOT: lba 1 says TEXT
 *     AOEDE-BOOT: lba 2047 says TEXT
 *     AOEDE-BOOT: lba 2046 written
 *     AOEDE-BOOT: done
 *
 * TEXT is what the sector holds up to its first byte that is not printable
 * ASCII.  LBA 2046 becomes a copy of 2047.  A read or write that the BIOS
 * reports as failed says "failed" instead of what it says here, and the rest
 * follows all the same.
 *
 * The BIOS may use the same port as a console, late and from its timer.  So
 * each line is printed in one go, without interrupts, and has a line end
 * before it as well as after it.
 *
 * The tests use bootsector.hex, so that they need no assembler.  After a
 * change make it anew:
 *
 *     as --32 -o bootsector.o bootsector.S
 *     ld -m elf_i386 -N -e start -Ttext 0x7c00 --oformat binary \
 *         -o bootsector.bin bootsector.o
 *     od -An -v -tx1 bootsector.bin
 */
        .code16
        .intel_syntax noprefix

        .set    COM1, 0x3f8
        .set    EXIT, 0xf4      /* qemu's isa-debug-exit: status 2 * 16 + 1 = 33 */
        .set    BUFFER, 0x8000

        .text
        .globl  start
start:
        /* Some BIOSes enter at 07c0:0000. */
        jmp     0:1f
1:      cli
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7c00
        cld
        mov     [drive], dl

        mov     si, offset uart
2:      lodsw
        xchg    ax, dx          /* the port in DX */
        test    dx, dx
        jz      3f
        lodsb
        out     dx, al
        jmp     2b
3:
        mov     si, offset runs
        call    line

        mov     si, offset lba_1
        mov     ax, 1
        call    read
        mov     si, offset lba_2047
        mov     ax, 2047
        call    read

        /* The buffer still holds LBA 2047. */
        mov     ax, 2046
        mov     bx, 0x4300
        call    disk
        mov     si, offset lba_2046
        call    prefixed
        mov     si, offset failed
        test    bl, bl
        jnz     4f
        mov     si, offset written
4:      call    print
        call    newline

        mov     si, offset done
        call    line
        /* The last bytes must have left before the machine does. */
        mov     dx, COM1 + 5
5:      in      al, dx
        test    al, 0x40
        jz      5b
        mov     al, 16
        out     EXIT, al
6:      hlt
        jmp     6b

/* Reads sector AX and prints SI and what it says. */
read:
        push    si
        mov     bx, 0x4200
        call    disk
        pop     si
        call    prefixed
        mov     si, offset failed
        test    bl, bl
        jnz     1f
        mov     si, offset says
        call    print
        mov     si, BUFFER
1:      call    print
        jmp     newline

/* INT 13h function BX on sector AX and the buffer; BL is 1 if it fails. */
disk:
        mov     [packet_lba], ax
        mov     si, offset packet
        mov     word ptr [si + 2], 1    /* a BIOS may change it */
        mov     dl, [drive]
        mov     ax, bx
        sti
        int     0x13
        cli
        cld
        setc    bl
        ret

line:
        call    prefixed
newline:
        push    si
        mov     si, offset crlf
1:      lodsb
        call    put
        cmp     al, 10
        jne     1b
        pop     si
        ret
prefixed:
        call    newline
        push    si
        mov     si, offset prefix
        call    print
        pop     si

/* Prints printable bytes from SI on, at most one sector of them. */
print:
        mov     cx, 512
1:      lodsb
        cmp     al, 0x20
        jb      2f
        cmp     al, 0x7e
        ja      2f
        call    put
        loop    1b
2:      ret

put:
        push    ax
        mov     dx, COM1 + 5
1:      in      al, dx
        test    al, 0x20
        jz      1b
        pop     ax
        mov     dx, COM1
        out     dx, al
        ret

/* 115200 baud, 8 data bits, no parity, no interrupts. */
uart:
        .word   COM1 + 1
        .byte   0
        .word   COM1 + 3
        .byte   0x80
        .word   COM1
        .byte   1
        .word   COM1 + 1
        .byte   0
        .word   COM1 + 3
        .byte   3
        .word   0

prefix:         .asciz  "AOEDE-BOOT: "
runs:           .asciz  "sector 0 runs"
lba_1:          .asciz  "lba 1 "
lba_2047:       .asciz  "lba 2047 "
lba_2046:       .asciz  "lba 2046 "
says:           .asciz  "says "
written:        .asciz  "written"
failed:         .asciz  "failed"
done:           .asciz  "done"
crlf:           .ascii  "\r\n"

packet:
        .byte   16, 0
        .word   1               /* sectors */
        .word   BUFFER, 0       /* offset, segment */
packet_lba:
        .quad   0
drive:
        .byte   0

        /* Where an MBR has its partition table there is none. */
        .org    446
        .fill   64, 1, 0
        .byte   0x55, 0xaa
