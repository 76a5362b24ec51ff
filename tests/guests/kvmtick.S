# A guest for QEMU's small firmware qboot, of so few instructions that a KVM that interprets them one by one runs it too:
# prints `C<counter> B<boots>` in hexadecimal on COM1 18 times a second. boots is kept in memory alone, which a reset leaves
# as it is. The ACPI power button makes it print P and power off. See make-kvmtick.
.section .note.Xen, "a", @note      # the entry of a kernel that knows PVH
.align 4
.long 4, 4, 18
.asciz "Xen"
.long _start
.set boots, 0x8000                  # where nothing is loaded
.text
.code32
.globl _start
_start: mov $stack,%esp
    mov $0x602,%dx; mov $0x100,%ax; out %ax,%dx   # enable the ACPI power button
    mov $0x34,%al; out %al,$0x43; xor %al,%al; out %al,$0x40; out %al,$0x40   # the timer counts 65536 down, again and again
    incl boots
loop: incl counter; mov $'C',%al; call putc; mov counter,%eax; call hex
    mov $'B',%al; call putc; mov boots,%eax; call hex; mov $'\n',%al; call putc
1:  mov $0x600,%dx; in %dx,%ax; test $1,%ah; jnz off
    xor %al,%al; out %al,$0x43; in $0x40,%al; mov %al,%cl; in $0x40,%al; mov %al,%ch
    mov last,%bx; mov %cx,last; cmp %bx,%cx; jbe 1b; jmp loop
off: mov $'P',%al; call putc; mov $0x604,%dx; mov $0x2000,%ax; out %ax,%dx; jmp off
hex: mov $8,%ecx
2:  rol $4,%eax; push %eax; and $15,%al; add $'0',%al; cmp $'9',%al; jbe 3f; add $39,%al
3:  call putc; pop %eax; loop 2b; mov $' ',%al
putc: push %edx; push %eax; mov $0x3fd,%dx
4:  in %dx,%al; test $0x20,%al; jz 4b; pop %eax; mov $0x3f8,%dx; out %al,%dx; pop %edx; ret
.data
.align 4
counter: .long 0
last: .word 0
.bss
.skip 256
stack:
